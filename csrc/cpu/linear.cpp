// linear:  y[n, m] = sum_k x[n, k] weight[m, k] (+ bias[m])        for the few rows n of a decoding step
//
// x [N, K]   weight [M, K]   bias [M]   y [N, M];   x, y, bias f32 or bf16, weight f32 or bf16.
// The weights are read once, from memory: their bytes bound it (2 N flops a weight, N <= 16 or so). A big N belongs to
// a GEMM. The sums' order, and why it matters: linear.h.
#include "linear.h"

#include "../common/check.h"
#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

template <class E, class W>
static void run(const View& y, const typename E::X* x, int64_t N, int64_t Kp, const View& weight, const float* bias) {
  const int64_t M = weight.size[0], K = weight.size[1];
  parallel_chunks(M, kOutputs, [&](int64_t begin, int64_t end, int64_t) {
    multiply<E>(x, N, Kp, weight.as<W>(), K, begin, end, [&](int64_t n, float* out) {
      for (int64_t m = begin; bias && m < end; ++m) out[m - begin] += bias[m];
      store_row(y.as<char>() + (n * M + begin) * bytes_of(y.dtype), out, y.dtype, end - begin);
    });
  });
}

static void linear_fwd(View y, View x, View weight, View bias, Stream) {
  IGPT_CHECK(is_float(x.dtype) && is_float(y.dtype) && is_float(weight.dtype), "linear: float32 or bfloat16 only");
  IGPT_CHECK(weight.ndim == 2 && x.cols() == weight.size[1], "linear: weight must be [M, K] with K the columns of x");
  IGPT_CHECK(y.rows() == x.rows() && y.cols() == weight.size[0], "linear: y must be [N, M]");
  IGPT_CHECK(x.dense() && y.dense() && weight.dense() && (!bias || bias.dense()), "linear: dense tensors only");
  IGPT_CHECK(!bias || (is_float(bias.dtype) && bias.numel() == weight.size[0]), "linear: bias must be [M]");
  const int64_t N = x.rows(), K = x.cols(), M = weight.size[0];
  auto b = scratch<float>(bias ? M : 0);
  if (bias) load_row(b.get(), bias.data, bias.dtype, M);
  const float* bs = bias ? b.get() : nullptr;
#if defined(__AVX512BF16__)
  if (x.dtype == DType::bf16 && weight.dtype == DType::bf16) {
    const int64_t Kp = padded_for<Pairs>(K);
    auto rows = scratch<bf16>(N * Kp);
    std::memset(rows.get(), 0, size_t(N * Kp) * sizeof(bf16));
    for (int64_t n = 0; n < N; ++n) std::memcpy(rows.get() + n * Kp, row_of(x, n), size_t(K) * sizeof(bf16));
    return run<Pairs, bf16>(y, rows.get(), N, Kp, weight, bs);
  }
#endif
  const int64_t Kp = padded(K);
  auto rows = scratch<float>(N * Kp);
  std::memset(rows.get(), 0, size_t(N * Kp) * sizeof(float));
  for (int64_t n = 0; n < N; ++n) load_row(rows.get() + n * Kp, row_of(x, n), x.dtype, K);
  if (weight.dtype == DType::f32)
    run<Wide<float>, float>(y, rows.get(), N, Kp, weight, bs);
  else
    run<Wide<bf16>, bf16>(y, rows.get(), N, Kp, weight, bs);
}

void fill_linear(Ops& t) {
  t.linear_fwd = linear_fwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
