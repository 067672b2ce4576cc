// How a dropout draws, on every backend: a hash of the seed and of a weight's place decides whether it is kept, so that
// no mask is stored and the backward pass asks again, in whichever order. igpt_fast/reference/dropout.py says the same.
#pragma once
#include "check.h"

#if defined(__CUDACC__)
#define IGPT_BOTH_SIDES __host__ __device__ __forceinline__
#else
#define IGPT_BOTH_SIDES IGPT_INLINE
#endif

namespace igpt {

struct Draws {
  static constexpr uint32_t kKey = 0x9e3779b1u, kFirst = 0x7feb352du, kSecond = 0x846ca68bu;
  uint64_t seed = 0;
  uint32_t dropped = 0;  // of 2^32
  float factor = 1.f;    // of the weights that are kept

  Draws() = default;
  IGPT_INLINE Draws(float p, int64_t s) : seed(mix(uint64_t(s))) {
    IGPT_CHECK(p >= 0.f && p < 1.f && s >= 0, "dropout: it needs 0 <= p < 1 and a seed that is not negative");
    const int levels = int(p * 16777216.f);  // of 2^24
    dropped = uint32_t(levels) << 8;
    factor = float(16777216. / (16777216 - levels));
  }
  // 64 bits of a query of a head, with which those of its keys are mixed.
  IGPT_BOTH_SIDES uint64_t query(int64_t bh, uint32_t t) const { return mix(seed ^ (uint64_t(bh) << 32 | t)); }

 private:
  static IGPT_BOTH_SIDES uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};

}  // namespace igpt
