// bias_quick_gelu:  z = x (+ bias)    y = z sigmoid(1.702 z)
//
// x, y [..., C] of one dtype (f32, bf16)   bias [C] f32 or bf16, may be absent.   Bound by the bytes of x and y.
// Backward:  sg = sigmoid(1.702 z)    dx = dy sg (1 + 1.702 z (1 - sg))    dbias = sum over rows of dx: [P, C], the
// rows are split into P equal groups, and row p is the sum of group p, then row 0 that of all.
#include "activation.h"

#include "../common/check.h"
#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kRows = 32;

static inline vf gradient(vf dy, vf z) {
  const vf s = sigmoid(z);
  return dy * s * (1.f + kQuickGelu * z * (1.f - s));
}

static void check_gelu(const View& y, const View& x, const View& bias) {
  IGPT_CHECK(is_float(x.dtype) && (!bias || is_float(bias.dtype)), "bias_quick_gelu: float32 or bfloat16 only");
  IGPT_CHECK(same_shape(x, y) && x.dtype == y.dtype, "bias_quick_gelu: x and y must agree in shape and dtype");
  IGPT_CHECK(x.dense() && y.dense() && (!bias || bias.dense()), "bias_quick_gelu: dense tensors only");
  IGPT_CHECK(!bias || bias.numel() == x.cols(), "bias_quick_gelu: bias must have one element a column");
}

template <class T>
static void fwd_row(T* y, const T* x, const float* b, int64_t C) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) store(y + c, quick_gelu(load(x + c) + load(b + c)));
  if (c < C) store_n(y + c, quick_gelu(load_n(x + c, C - c) + load(b + c)), C - c);
}

template <class T>
static void bwd_row(T* dx, float* dbias, const T* dy, const T* x, const float* b, int64_t C) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, C - c);
    const vf d = gradient(load_upto(dy + c, n), load_upto(x + c, n) + load(b + c));
    if (dbias) store_upto(dbias + c, load_upto(dbias + c, n) + d, n);
    store_upto(dx + c, d, n);
  }
}

static void bias_quick_gelu_fwd(View y, View x, View bias, Stream) {
  check_gelu(y, x, bias);
  const int64_t C = x.cols(), N = x.rows();
  const auto b = floats_of(bias, C);
  const auto run = [&](auto like) {
    using T = decltype(like);
    parallel_chunks(N, kRows, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t n = begin; n < end; ++n) fwd_row(row_of<T>(y, n), row_of<T>(x, n), b.get(), C);
    });
  };
  by_dtype(run, x.dtype);
}

static void bias_quick_gelu_bwd(View dx, View dbias, View dy, View x, View bias, Stream) {
  check_gelu(dx, x, bias);
  check_gelu(dy, x, bias);
  IGPT_CHECK(!dbias || (dbias.dtype == DType::f32 && dbias.ndim == 2 && dbias.cols() == x.cols() && dbias.dense()),
             "bias_quick_gelu_bwd: dbias must be float32 [P, C]");
  const int64_t C = x.cols(), N = x.rows();
  const int64_t groups = dbias ? dbias.size[0] : (N + kRows - 1) / kRows;
  const auto b = floats_of(bias, C);
  const auto run = [&](auto like) {
    using T = decltype(like);
    parallel_for(groups, [&](int64_t group, int) {
      float* db = row_of<float>(dbias, group);
      if (db) std::memset(db, 0, size_t(C) * sizeof(float));
      for (int64_t n = group * N / groups; n < (group + 1) * N / groups; ++n)
        bwd_row(row_of<T>(dx, n), db, row_of<T>(dy, n), row_of<T>(x, n), b.get(), C);
    });
  };
  by_dtype(run, x.dtype);
  if (dbias) sum_groups(dbias.as<float>(), groups, C);
}

void fill_activation(Ops& t) {
  t.bias_quick_gelu_fwd = bias_quick_gelu_fwd;
  t.bias_quick_gelu_bwd = bias_quick_gelu_bwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
