// Which elements a dropout keeps, for dropout.cpp and the attention kernels.
#pragma once
#include "../common/dropout.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

// first, first + 1, ...
static inline vu counted(uint32_t first) {
  vu lanes;  // a constant: with `first` in it the compiler would put the lanes in one by one
  for (int i = 0; i < kLanes; ++i) lanes[i] = uint32_t(i);
  return lanes + first;
}

struct Dropout : Draws {
  using Draws::Draws;
  explicit operator bool() const { return dropped > 0; }
  // `factor` where the weight of a query (its low and high bits) and a key is kept, else 0.
  vf weights(vu low, vu high, vu key) const {
    vu x = key * kKey + low;
    x ^= x >> 16;
    x *= kFirst;
    x ^= high;
    x ^= x >> 15;
    x *= kSecond;
    return x >= vu{} + dropped ? splat(factor) : vf{};
  }
  // The bits of `count` queries from t on.
  void queries(uint32_t* low, uint32_t* high, int64_t bh, int64_t t, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) {
      const uint64_t drawn = query(bh, uint32_t(t + r));
      low[r] = uint32_t(drawn), high[r] = uint32_t(drawn >> 32);
    }
  }
};

}  // namespace IGPT_ISA
}  // namespace igpt
