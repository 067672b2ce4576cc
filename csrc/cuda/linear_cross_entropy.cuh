// What the two files of linear_cross_entropy share: the running softmax, and Hopper's launchers.
#pragma once
#include "../common/math.h"
#include "device.cuh"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

constexpr float kLargest = 3.402823466e+38f;

// The sum of exp(x - top) over some x, and their maximum, kept finite: then no difference is of two infinities.
struct Softmax {
  float top = -kLargest, sum = 0.f;
  __device__ void raise(float higher) {
    higher = fminf(higher, kLargest);
    sum *= ptx::ex2((top - higher) * kLog2e);
    top = higher;
  }
  __device__ void add(float x) { sum += ptx::ex2((x - top) * kLog2e); }
  __device__ void join(float other_top, float other_sum) {
    raise(fmaxf(top, other_top));
    sum += other_sum * ptx::ex2((other_top - top) * kLog2e);
  }
  // With the other lanes of four that share a row.
  __device__ void join_four() {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2)
      join(__shfl_xor_sync(0xffffffffu, top, offset), __shfl_xor_sync(0xffffffffu, sum, offset));
  }
  __device__ float lse() const { return top + logf(sum); }
};

__device__ inline float dlogit(float logit, float lse, float dloss, bool is_target) {
  const float d = ptx::ex2((logit - lse) * kLog2e) * dloss;
  return is_target ? d - dloss : d;
}

// Hopper's kernels (linear_cross_entropy_sm90.cu): 16-bit, rows of both operands a multiple of 16 bytes apart, not 0.
void linear_cross_entropy_fwd_sm90(View loss, View lse, View hidden, View weight, View targets, Stream stream);
void linear_cross_entropy_dlogits_sm90(View dlogits, View dloss, View hidden, View weight, View targets, View lse,
                                       Stream stream);

}  // namespace cuda
}  // namespace igpt
