// linear:  y[n, m] = sum_k x[n, k] weight[m, k] (+ bias[m])        for the few rows n of a decoding step
//
// x [N, K]   weight [M, K]   bias [M]   y [N, M];   x, y, bias f32 or bf16, weight f32 or bf16.
// The weights are read once, from memory: their bytes bound it (2 N flops a weight, N <= 16 or so). A big N belongs to
// a GEMM. Every y[n, m] is summed in an order that K alone decides, so a row's bits do not depend on which rows stand
// beside it: sampling an image alone or in a batch gives the same image.
#include "../common/check.h"
#include "parallel.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kOutputs = 16;         // weight rows a task
constexpr int kM = 4, kN = kLanes / kM;  // weight rows x input rows held in registers: one vector of results

// What is multiplied: floats, or, where the processor has the instruction and both sides are bf16, pairs of bf16.
template <class W>
struct Wide {
  using X = float;
  static constexpr int kStep = kLanes;
  static vf dot(vf acc, const float* x, const W* w) { return acc + load(x) * load(w); }
  static vf dot_n(vf acc, const float* x, const W* w, int64_t n) { return acc + load(x) * load_n(w, n); }
};
#if defined(__AVX512BF16__)
struct Pairs {
  using X = bf16;
  static constexpr int kStep = 2 * kLanes;
  static __m512bh pairs(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static vf dot(vf acc, const bf16* x, const bf16* w) {
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), pairs(x), pairs(w)));
  }
  static vf dot_n(vf acc, const bf16* x, const bf16* w, int64_t n) {
    bf16 full[kStep] = {};
    std::memcpy(full, w, size_t(n) * sizeof(bf16));
    return dot(acc, x, full);
  }
};
#endif

// Lane i kM + j: the dot product of x's row i and w's row j, over K elements. x is padded with zeros to Kp; w is not.
// Rows behind the last repeat it; their lanes are not used.
template <class E, int N, class W>
static inline vf dots(const typename E::X* x, int64_t Kp, const W* w, int64_t K, int ms) {
  vf acc[kN * kM] = {};
  const W* row[kM];
  for (int j = 0; j < kM; ++j) row[j] = w + std::min(j, ms - 1) * K;
  int64_t k = 0;
  for (; k + E::kStep <= K; k += E::kStep)
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < kM; ++j) acc[i * kM + j] = E::dot(acc[i * kM + j], x + i * Kp + k, row[j] + k);
  if (k < K)
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < kM; ++j) acc[i * kM + j] = E::dot_n(acc[i * kM + j], x + i * Kp + k, row[j] + k, K - k);
  return sums(acc);
}

template <class E, int N, class W>
static void run_rows(const View& y, const typename E::X* x, int64_t n, int64_t Kp, const View& weight,
                     const float* bias, int64_t begin, int64_t end) {
  const int64_t M = weight.size[0], K = weight.size[1];
  for (int64_t m = begin; m < end; m += kM) {
    const int ms = int(std::min<int64_t>(kM, end - m));
    float out[kLanes];
    store(out, dots<E, N, W>(x + n * Kp, Kp, weight.as<W>() + m * K, K, ms));
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < ms; ++j) out[i * kM + j] += bias ? bias[m + j] : 0.f;
    for (int i = 0; i < N; ++i)
      store_row(y.as<char>() + ((n + i) * M + m) * bytes_of(y.dtype), out + i * kM, y.dtype, ms);
  }
}

template <class E, class W>
static void run(const View& y, const typename E::X* x, int64_t N, int64_t Kp, const View& weight, const float* bias) {
  parallel_chunks(weight.size[0], kOutputs, [&](int64_t begin, int64_t end, int64_t) {
    int64_t n = 0;
    for (; n + kN <= N; n += kN) run_rows<E, kN, W>(y, x, n, Kp, weight, bias, begin, end);
    for (; n < N; ++n) run_rows<E, 1, W>(y, x, n, Kp, weight, bias, begin, end);
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
    const int64_t Kp = (K + Pairs::kStep - 1) / Pairs::kStep * Pairs::kStep;
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
