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

constexpr int64_t kOutputs = 16;  // weight rows a task
constexpr int kM = 4, kN = 4;     // weight rows x input rows held in registers

// y[i][j] = dot(x row i, w row j) over Kp elements. x is padded with zeros; w is not, hence its tail.
template <int N, int M, class W>
static void dots(float (&y)[kN][kM], const float* x, int64_t Kp, const W* w, int64_t K) {
  vf acc[N][M] = {};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    vf wv[M];
    for (int j = 0; j < M; ++j) wv[j] = load(w + j * K + k);
    for (int i = 0; i < N; ++i) {
      const vf xv = load(x + i * Kp + k);
      for (int j = 0; j < M; ++j) acc[i][j] += xv * wv[j];
    }
  }
  if (k < K)
    for (int j = 0; j < M; ++j) {
      const vf wv = load_n(w + j * K + k, K - k);
      for (int i = 0; i < N; ++i) acc[i][j] += load(x + i * Kp + k) * wv;
    }
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < M; ++j) y[i][j] = sum(acc[i][j]);
}

template <int N, class W>
static void dots_m(int M, float (&y)[kN][kM], const float* x, int64_t Kp, const W* w, int64_t K) {
  switch (M) {
    case 4:
      return dots<N, 4>(y, x, Kp, w, K);
    case 3:
      return dots<N, 3>(y, x, Kp, w, K);
    case 2:
      return dots<N, 2>(y, x, Kp, w, K);
    default:
      return dots<N, 1>(y, x, Kp, w, K);
  }
}

template <class W>
static void dots_nm(int N, int M, float (&y)[kN][kM], const float* x, int64_t Kp, const W* w, int64_t K) {
  switch (N) {
    case 4:
      return dots_m<4>(M, y, x, Kp, w, K);
    case 3:
      return dots_m<3>(M, y, x, Kp, w, K);
    case 2:
      return dots_m<2>(M, y, x, Kp, w, K);
    default:
      return dots_m<1>(M, y, x, Kp, w, K);
  }
}

static void put(const View& y, int64_t at, float value) {
  if (y.dtype == DType::f32)
    y.as<float>()[at] = value;
  else
    store_n(y.as<bf16>() + at, splat(value), 1);
}

template <class W>
static void run(const View& y, const float* x, int64_t N, int64_t Kp, const View& weight, const float* bias) {
  const int64_t M = weight.size[0], K = weight.size[1];
  parallel_chunks(M, kOutputs, [&](int64_t begin, int64_t end, int64_t) {
    float out[kN][kM];
    for (int64_t n = 0; n < N; n += kN)
      for (int64_t m = begin; m < end; m += kM) {
        const int ns = int(std::min<int64_t>(kN, N - n)), ms = int(std::min<int64_t>(kM, end - m));
        dots_nm(ns, ms, out, x + n * Kp, Kp, weight.as<W>() + m * K, K);
        for (int i = 0; i < ns; ++i)
          for (int j = 0; j < ms; ++j) put(y, (n + i) * M + m + j, out[i][j] + (bias ? bias[m + j] : 0.f));
      }
  });
}

static void linear_fwd(View y, View x, View weight, View bias, Stream) {
  IGPT_CHECK(is_float(x.dtype) && is_float(y.dtype) && is_float(weight.dtype), "linear: float32 or bfloat16 only");
  IGPT_CHECK(weight.ndim == 2 && x.cols() == weight.size[1], "linear: weight must be [M, K] with K the columns of x");
  IGPT_CHECK(y.rows() == x.rows() && y.cols() == weight.size[0], "linear: y must be [N, M]");
  IGPT_CHECK(x.dense() && y.dense() && weight.dense() && (!bias || bias.dense()), "linear: dense tensors only");
  IGPT_CHECK(!bias || (is_float(bias.dtype) && bias.numel() == weight.size[0]), "linear: bias must be [M]");
  const int64_t N = x.rows(), K = x.cols(), Kp = padded(K), M = weight.size[0];
  auto rows = scratch<float>(N * Kp);
  std::memset(rows.get(), 0, size_t(N * Kp) * sizeof(float));
  for (int64_t n = 0; n < N; ++n) load_row(rows.get() + n * Kp, row_of(x, n), x.dtype, K);
  auto b = scratch<float>(bias ? M : 0);
  if (bias) load_row(b.get(), bias.data, bias.dtype, M);
  if (weight.dtype == DType::f32)
    run<float>(y, rows.get(), N, Kp, weight, bias ? b.get() : nullptr);
  else
    run<bf16>(y, rows.get(), N, Kp, weight, bias ? b.get() : nullptr);
}

void fill_linear(Ops& t) {
  t.linear_fwd = linear_fwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
