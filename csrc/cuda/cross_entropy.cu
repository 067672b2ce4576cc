// cross_entropy:  lse = log sum exp(logits)    loss = lse - logits[target] one
// value a row, natural logarithm
//
// logits [N, V] f32, bf16 or f16   targets [N] i64   loss, lse [N] f32.   One
// warp a row, four rows a block. A lane holds 16 logits in registers, so 512 of
// a row at a time: their maximum first, then their sum, and a longer row scales
// the sum so far by exp(old maximum - new): device memory sees each logit once,
// whatever V. Lanes and then steps add in one order. Bound by bytes: V logits a
// row forward, 2 V backward; one exp2 a logit, at 16 a clock and
// multiprocessor, takes less. Backward:  dlogits = (softmax(logits) -
// onehot(target)) dloss;  dlogits may be the same memory as logits: a lane has
// read what it overwrites, and nobody else reads that.
//
// A target outside 0..V-1 cannot be refused here, since no host reads it: its
// row has loss NaN and a gradient of NaN throughout, so that it shows in
// whatever is summed from it. A row of nothing but -inf: lse -inf, loss NaN.
// sass cross_entropy_fwd_kernel<bf16, 8>: LDG.128 = 2, LDG = 0, MUFU = 17, LDS = 0, BAR = 0, LOCAL = 0
// sass cross_entropy_bwd_kernel<bf16, 8>: LDG.128 = 2, STG.128 = 2, STG = 0, MUFU = 16, BAR = 0, LOCAL = 0
#include "../common/check.h"
#include "../common/math.h"
#include "device.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

constexpr int kWarps = 4;  // rows a block
constexpr int kHeld = 16;  // logits a lane holds
constexpr float kLargest = 3.402823466e+38f;

// ---- a row in pieces of 512 ----

// Calls f(piece, c) for each piece; piece[j] holds columns c + 32 j V and the V
// - 1 after, -inf beyond the row.
template <class T, int V, class F>
__device__ inline void each_piece(const T* row, int C, F f) {
  constexpr int kVectors = kHeld / V;
  for (int c = int(threadIdx.x % 32) * V; c < C; c += 32 * kHeld) {
    Floats<V> piece[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (c + 32 * j * V < C) {
        piece[j] = load_as<T, V>(row, c + 32 * j * V);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) piece[j].v[k] = -INFINITY;
      }
    }
    f(piece, c);
  }
}

// ---- kernels ----

template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps) cross_entropy_fwd_kernel(float* loss,             // [N]
                                                                        float* lse,              // [N]
                                                                        const T* logits,         // [N, C]
                                                                        const int64_t* targets,  // [N]
                                                                        int64_t N, int C) {
  constexpr int kVectors = kHeld / V;
  const int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n >= N) return;  // whole warps, and no barrier follows
  const T* row = logits + n * C;

  // The maximum stays finite: then no difference below is of two infinities,
  // and rows with -inf or +inf come out right.
  float top = -kLargest, sum = 0.f;
  each_piece<T, V>(row, C, [&](const Floats<V>(&piece)[kVectors], int) {
    float higher = top;
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int k = 0; k < V; ++k) higher = fmaxf(higher, piece[j].v[k]);
    higher = fminf(higher, kLargest);
    sum *= ptx::ex2((top - higher) * kLog2e);
    top = higher;
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int k = 0; k < V; ++k) sum += ptx::ex2((piece[j].v[k] - top) * kLog2e);
  });

  float all = top;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, offset));
  sum *= ptx::ex2((top - all) * kLog2e);
#pragma unroll
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);

  if (threadIdx.x % 32 == 0) {
    const float l = all + logf(sum);
    const int64_t t = targets[n];
    lse[n] = l;
    loss[n] = t >= 0 && t < C ? l - load_as<T, 1>(row, t).v[0] : NAN;
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
  each_piece<T, V>(logits + n * C, C, [&](const Floats<V>(&piece)[kVectors], int c) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int first = c + 32 * j * V;
      Floats<V> d;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        d.v[k] = ptx::ex2((piece[j].v[k] - l) * kLog2e) * g;
        if (first + k == target) d.v[k] -= g;
      }
      if (first < C) store_as<T, V>(dlogits, n * C + first, d);
    }
  });
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

static unsigned blocks_of(int64_t N) {
  return unsigned((N + kWarps - 1) / kWarps);
}

static void cross_entropy_fwd(View loss, View lse, View logits, View targets, Stream stream) {
  check_rows(logits, targets, lse), check_rows(logits, targets, loss);
  const int64_t N = logits.rows(), C = logits.cols();
  if (N == 0) return;
  const OnDevice device(logits);
  by_type(logits.dtype, in_sixteens(logits.dtype, C, {logits}), [&]<class T, int V>() {
    LAUNCH((cross_entropy_fwd_kernel<T, V>), blocks_of(N), 32 * kWarps, 0, stream, loss.as<float>(), lse.as<float>(),
           logits.as<T>(), targets.as<int64_t>(), N, int(C));
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
    LAUNCH((cross_entropy_bwd_kernel<T, V>), blocks_of(N), 32 * kWarps, 0, stream, dlogits.as<T>(), dloss.as<float>(),
           logits.as<T>(), targets.as<int64_t>(), lse.as<float>(), N, int(C));
  });
}

void fill_cross_entropy(Ops& t) {
  t.cross_entropy_fwd = cross_entropy_fwd;
  t.cross_entropy_bwd = cross_entropy_bwd;
}

}  // namespace cuda
}  // namespace igpt
