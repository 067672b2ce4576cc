// The formula of quick GELU on vectors, for activation.cpp and decode_step.cpp.
#pragma once
#include "../common/math.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

static inline vf sigmoid(vf z) {
  return 1.f / (1.f + exp2(z * (-kQuickGelu * kLog2e)));
}
static inline vf quick_gelu(vf z) {
  return z * sigmoid(z);
}

}  // namespace IGPT_ISA
}  // namespace igpt
