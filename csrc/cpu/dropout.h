// Which elements a dropout keeps, for dropout.cpp and the attention kernels.
#pragma once
#include "../common/check.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

// Dropout of a softmax's weights, or of any elements. A hash of the seed and of a weight's place decides whether it is
// kept: no mask is stored, and the backward pass asks again, in whichever order.
struct Dropout {
  uint64_t seed = 0;
  int32_t dropped = 0;  // of 2^24
  float factor = 1.f;   // of the weights that are kept

  Dropout() = default;
  Dropout(float p, int64_t s) : seed(mix(uint64_t(s))), dropped(int32_t(p * 16777216.f)) {
    IGPT_CHECK(p >= 0.f && p < 1.f && s >= 0, "dropout: it needs 0 <= p < 1 and a seed that is not negative");
    factor = float(16777216. / (16777216 - dropped));
  }
  explicit operator bool() const { return dropped > 0; }
  // 64 bits of a query of a head, with which those of its keys are mixed.
  uint64_t query(int64_t bh, int64_t t) const { return mix(seed ^ (uint64_t(bh) << 32 | uint64_t(t))); }
  // `factor` where the weight of a query (its low and high bits) and a key is kept, else 0.
  vf weights(vu low, vu high, vu key) const {
    vu x = key * 0x9e3779b1u + low;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= high;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x >= vu{} + (uint32_t(dropped) << 8) ? splat(factor) : vf{};  // of 2^32 as many as of 2^24
  }

 private:
  static uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};
// first, first + 1, ...
static inline vu counted(uint32_t first) {
  vu lanes;  // a constant: with `first` in it the compiler would put the lanes in one by one
  for (int i = 0; i < kLanes; ++i) lanes[i] = uint32_t(i);
  return lanes + first;
}

}  // namespace IGPT_ISA
}  // namespace igpt
