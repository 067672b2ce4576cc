// linear:  y[n, m] = (residual[n, m] +) f(sum_k x'[n, k] weight[m, k] (+ bias[m]))   for a decoding step's few rows
//
// x [N, K]   weight [M, K]   bias [M]   norm [K]   residual, y [N, M], each f32 or bf16.
// x' is x or, with a norm, x rstd norm as rms_norm has it;   f is quick GELU or nothing.
// The weights are read once, from memory: their bytes bound it (2 N flops a weight, N <= 16 or so). A big N belongs to
// a GEMM. The sums' order, and why it matters: linear.h.
#include "linear.h"

#include "../common/check.h"
#include "activation.h"
#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

// What becomes of the sums.
struct Ending {
  const float* bias;  // or null
  View residual;
  bool gelu;
};

template <class E, class W>
static void run(const View& y, const typename E::X* x, int64_t N, int64_t Kp, const View& weight,
                const Ending& ending) {
  const int64_t M = weight.size[0], K = weight.size[1];
  const auto prepared = scratch<uint32_t>(room_for<E>(N, K));
  prepare<E>(prepared.get(), x, N, K);
  parallel_chunks(M, kOutputs, [&](int64_t begin, int64_t end, int64_t) {
    const MatrixUnit used;
    multiply<E>(x, prepared.get(), N, Kp, weight.as<W>(), K, begin, end, [&](int64_t n, float* out) {
      for (int64_t m = begin; ending.bias && m < end; ++m) out[m - begin] += ending.bias[m];
      for (int64_t c = 0; ending.gelu && c < end - begin; c += kLanes) store(out + c, quick_gelu(load(out + c)));
      const auto place = [&](const View& v) { return v.as<char>() + (n * M + begin) * bytes_of(v.dtype); };
      if (ending.residual) {
        float r[kOutputs];
        load_row(r, place(ending.residual), ending.residual.dtype, end - begin);
        for (int64_t m = 0; m < end - begin; ++m) out[m] += r[m];
      }
      store_row(place(y), out, y.dtype, end - begin);
    });
  });
}

// A row of x as floats, by the norm where there is one; with zeros behind its columns, as `row` and `norm` have them.
static void read_row(float* row, const View& x, int64_t n, const float* norm, float eps) {
  const int64_t K = x.cols();
  load_row(row, row_of(x, n), x.dtype, K);
  if (!norm) return;
  vf squares = {};
  for (int64_t k = 0; k < K; k += kLanes) squares += load(row + k) * load(row + k);
  const vf rstd = splat(1.f / std::sqrt(sum(squares) / float(K) + eps));
  for (int64_t k = 0; k < K; k += kLanes) store(row + k, load(row + k) * rstd * load(norm + k));
}

static void linear_fwd(View y, View x, View weight, View bias, View norm, View residual, float eps, bool gelu, Stream) {
  for (const View* v : {&x, &y, &weight, &bias, &norm, &residual})
    IGPT_CHECK(!*v || (is_float(v->dtype) && v->dense()), "linear: dense tensors of float32 or bfloat16 only");
  IGPT_CHECK(weight.ndim == 2 && x.cols() == weight.size[1], "linear: weight must be [M, K] with K the columns of x");
  IGPT_CHECK(y.rows() == x.rows() && y.cols() == weight.size[0], "linear: y must be [N, M]");
  IGPT_CHECK(!bias || bias.numel() == weight.size[0], "linear: bias must be [M]");
  IGPT_CHECK(!norm || norm.numel() == x.cols(), "linear: norm must be [K]");
  IGPT_CHECK(!residual || same_shape(residual, y), "linear: residual must be shaped like y");
  const int64_t N = x.rows(), K = x.cols(), M = weight.size[0], Kp = padded(K);
  const auto b = floats_of(bias, bias ? M : 0), g = floats_of(norm, norm ? K : 0);
  const Ending ending{bias ? b.get() : nullptr, residual, gelu};
  const float* gains = norm ? g.get() : nullptr;
  // E says what is multiplied, see linear.h, w of what the weight is.
  const auto multiplied = [&](auto element, auto w) {
    using E = decltype(element);
    using X = typename E::X;
    constexpr DType kDType = std::is_same_v<X, bf16> ? DType::bf16 : DType::f32;
    const int64_t stride = padded_for<E>(K);
    const bool ready = !norm && x.dtype == kDType && stride == K;  // it is read where it lies
    const auto rows = zeros<X>(ready ? 0 : N * stride);
    const auto row = zeros<float>(ready ? 0 : Kp);
    for (int64_t n = 0; !ready && n < N; ++n) {
      read_row(row.get(), x, n, gains, eps);
      store_row(rows.get() + n * stride, row.get(), kDType, K);
    }
    run<E, decltype(w)>(y, ready ? x.as<X>() : rows.get(), N, stride, weight, ending);
  };
  if (weight.dtype == DType::f32) return multiplied(Wide<float>(), float());
  if (x.dtype == DType::bf16) return multiplied(HalfRows(), bf16());
  multiplied(Wide<bf16>(), bf16());
}

void fill_linear(Ops& t) {
  t.linear_fwd = linear_fwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
