// The formula of quick GELU, for activation.cu and linear.cu.
#pragma once
#include "../common/math.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

__device__ inline float sigmoid(float z) {
  return __fdividef(1.f, 1.f + ptx::ex2(z * (-kQuickGelu * kLog2e)));
}
__device__ inline float quick_gelu(float z) {
  return z * sigmoid(z);
}

}  // namespace cuda
}  // namespace igpt
