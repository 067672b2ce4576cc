// cross_entropy:  lse = log sum exp(logits)    loss = lse - logits[target]    one value a row, natural logarithm
//
// logits [N, V] f32, bf16 or f16   targets [N] i64   loss, lse [N] f32. A lane holds 16 logits of a row in registers, a
// warp 512 at a time: their maximum first, then their sum, and a longer row scales the sum so far by exp(old maximum -
// new): device memory sees each logit once, whatever V. Lanes and then steps add in one order. Forward, a warp has two
// rows, loads their targets and pieces before it computes, and asks for the target's logit before the sums, so that no
// load is waited for alone. Bound by bytes: V logits a row forward, 2 V backward; one exp2 a logit, at 16 a clock and
// multiprocessor, takes less. Backward, one row a warp:  dlogits = (softmax(logits) - onehot(target)) dloss;  dlogits
// may be the same memory as logits: a lane has read what it overwrites, and nobody else reads that.
//
// A target outside 0..V-1 cannot be refused here, since no host reads it: its row has loss NaN and a gradient of NaN
// throughout, so that it shows in whatever is summed from it. A row of nothing but -inf: lse -inf, loss NaN.
// sass cross_entropy_fwd_kernel<bf16, 8>: LDG.128 = 4, LDG = 2, MUFU = 34, LDS = 0, BAR = 0, LOCAL = 0
// sass cross_entropy_bwd_kernel<bf16, 8>: LDG.128 = 2, STG.128 = 2, STG = 0, MUFU = 16, BAR = 0, LOCAL = 0
#include "../common/check.h"
#include "../common/math.h"
#include "device.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

constexpr int kWarps = 4;  // a block
constexpr int kRows = 2;   // a warp, forward
constexpr int kHeld = 16;  // logits a lane holds
constexpr float kLargest = 3.402823466e+38f;

// ---- a row in pieces of 512 ----

template <class T, int V>
struct Piece {
  Bits<T, V> vector[kHeld / V];  // vector j holds columns c + 32 j V and the V - 1 after
};

// The piece of `row` from column c on, c < C; -inf beyond the row, and throughout unless `given`.
template <class T, int V>
__device__ inline Piece<T, V> load_piece(const T* row, int c, int C, bool given = true) {
  Floats<V> nothing;
#pragma unroll
  for (int k = 0; k < V; ++k) nothing.v[k] = -INFINITY;
  Piece<T, V> piece;
#pragma unroll
  for (int j = 0; j < kHeld / V; ++j) {
    const bool inside = given && c + 32 * j * V < C;
    piece.vector[j] =
        inside ? __ldca(reinterpret_cast<const Bits<T, V>*>(row + c + 32 * j * V)) : bits_of<T, V>(nothing);
  }
  return piece;
}

// ---- kernels ----

template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps) cross_entropy_fwd_kernel(float* loss,             // [N]
                                                                        float* lse,              // [N]
                                                                        const T* logits,         // [N, C]
                                                                        const int64_t* targets,  // [N]
                                                                        int64_t N, int C) {
  constexpr int kVectors = kHeld / V;
  const int64_t n = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kRows;
  const int lane = threadIdx.x % 32;
  const T* row = logits + n * C;
  int64_t target[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) target[r] = n + r < N ? targets[n + r] : -1;

  // The maximum stays finite: then no difference below is of two infinities, and rows with -inf or +inf come out right.
  float top[kRows], sum[kRows], hit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) top[r] = -kLargest, sum[r] = 0.f, hit[r] = NAN;
  for (int c = lane * V; c - lane * V < C; c += 32 * kHeld) {
    Piece<T, V> piece[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) piece[r] = load_piece<T, V>(row + r * int64_t(C), c, C, n + r < N);
    if (c == lane * V)
#pragma unroll
      for (int r = 0; r < kRows; ++r)  // from the caches, while the sums are made
        if (target[r] >= 0 && target[r] < C) hit[r] = load_as<T, 1>(row, r * int64_t(C) + target[r]).v[0];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float higher = top[r];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const Floats<V> z = floats_of<T, V>(piece[r].vector[j]);
#pragma unroll
        for (int k = 0; k < V; ++k) higher = fmaxf(higher, z.v[k]);
      }
      higher = fminf(higher, kLargest);
      sum[r] *= ptx::ex2((top[r] - higher) * kLog2e);
      top[r] = higher;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const Floats<V> z = floats_of<T, V>(piece[r].vector[j]);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[r] += ptx::ex2((z.v[k] - top[r]) * kLog2e);
      }
    }
  }

  float all[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    all[r] = top[r];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) all[r] = fmaxf(all[r], __shfl_xor_sync(0xffffffffu, all[r], offset));
    sum[r] *= ptx::ex2((top[r] - all[r]) * kLog2e);
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], offset);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (lane == 0 && n + r < N) {
      const float l = all[r] + logf(sum[r]);
      lse[n + r] = l;
      loss[n + r] = l - hit[r];
    }
}

template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps) cross_entropy_bwd_kernel(T* dlogits,              // [N, C]
                                                                        const float* dloss,      // [N]
                                                                        const T* logits,         // [N, C]
                                                                        const int64_t* targets,  // [N]
                                                                        const float* lse,        // [N]
                                                                        int64_t N, int C) {
  constexpr int kVectors = kHeld / V;
  const int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n >= N) return;
  const int64_t t = targets[n];
  const bool valid = t >= 0 && t < C;
  const int target = valid ? int(t) : -1;
  const float g = valid ? dloss[n] : NAN, l = lse[n];
  for (int c = int(threadIdx.x % 32) * V; c < C; c += 32 * kHeld) {
    const Piece<T, V> piece = load_piece<T, V>(logits + n * C, c, C);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int first = c + 32 * j * V;
      Floats<V> d = floats_of<T, V>(piece.vector[j]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        d.v[k] = ptx::ex2((d.v[k] - l) * kLog2e) * g;
        if (first + k == target) d.v[k] -= g;
      }
      if (first < C) store_as<T, V>(dlogits, n * C + first, d);
    }
  }
}

// ---- launchers ----

static void check_rows(const View& logits, const View& targets, const View& lse) {
  IGPT_CHECK(is_gpu_float(logits.dtype), "cross_entropy: logits must be float32, bfloat16 or float16");
  IGPT_CHECK(targets.dtype == DType::i64, "cross_entropy: targets must be int64");
  IGPT_CHECK(lse.dtype == DType::f32, "cross_entropy: loss, its gradient and lse must be float32");
  IGPT_CHECK(targets.numel() == logits.rows() && lse.numel() == logits.rows(), "cross_entropy: one target a row");
  IGPT_CHECK(logits.dense() && targets.dense() && lse.dense(), "cross_entropy: dense tensors only");
  IGPT_CHECK(logits.cols() <= INT32_MAX - 32 * kHeld, "cross_entropy: too many columns");
}

static unsigned blocks_of(int64_t N, int rows) {
  return unsigned((N + rows - 1) / rows);
}

static void cross_entropy_fwd(View loss, View lse, View logits, View targets, Stream stream) {
  check_rows(logits, targets, lse), check_rows(logits, targets, loss);
  const int64_t N = logits.rows(), C = logits.cols();
  if (N == 0) return;
  const OnDevice device(logits);
  by_type(logits.dtype, in_sixteens(logits.dtype, C, {logits}), [&]<class T, int V>() {
    LAUNCH((cross_entropy_fwd_kernel<T, V>), blocks_of(N, kWarps * kRows), 32 * kWarps, 0, stream, loss.as<float>(),
           lse.as<float>(), logits.as<T>(), targets.as<int64_t>(), N, int(C));
  });
}

static void cross_entropy_bwd(View dlogits, View dloss, View logits, View targets, View lse, Stream stream) {
  check_rows(logits, targets, lse), check_rows(logits, targets, dloss);
  IGPT_CHECK(same_shape(dlogits, logits) && dlogits.dtype == logits.dtype && dlogits.dense(),
             "cross_entropy_bwd: dlogits must be shaped like logits");
  const int64_t N = logits.rows(), C = logits.cols();
  if (N == 0) return;
  const OnDevice device(logits);
  by_type(logits.dtype, in_sixteens(logits.dtype, C, {dlogits, logits}), [&]<class T, int V>() {
    LAUNCH((cross_entropy_bwd_kernel<T, V>), blocks_of(N, kWarps), 32 * kWarps, 0, stream, dlogits.as<T>(),
           dloss.as<float>(), logits.as<T>(), targets.as<int64_t>(), lse.as<float>(), N, int(C));
  });
}

void fill_cross_entropy(Ops& t) {
  t.cross_entropy_fwd = cross_entropy_fwd;
  t.cross_entropy_bwd = cross_entropy_bwd;
}

}  // namespace cuda
}  // namespace igpt
