// Which of a softmax's weights a dropout keeps, as igpt_fast/reference/dropout.py says: a hash of the seed and of a
// weight's place decides, so that no mask is stored and the backward pass asks again, in whichever order.
#pragma once
#include <cstdint>

#include "../common/check.h"

namespace igpt {
namespace cuda {

// Keeps all: a kernel for it has no trace of dropout.
struct NoDropout {
  static constexpr bool kDrops = false;
};

struct Dropout {
  static constexpr bool kDrops = true;
  struct alignas(8) Query {  // what its keys are mixed with
    uint32_t low, high;
  };
  uint64_t seed;
  uint32_t dropped;  // of 2^32
  float factor;      // of the weights that are kept

  Dropout(float p, int64_t s) : seed(mix(uint64_t(s))) {
    IGPT_CHECK(p >= 0.f && p < 1.f && s >= 0, "dropout: it needs 0 <= p < 1 and a seed that is not negative");
    const int levels = int(p * 16777216.f);
    dropped = uint32_t(levels) << 8;
    factor = float(16777216. / (16777216 - levels));
  }
  __device__ Query query(int bh, int t) const {
    const uint64_t bits = mix(seed ^ (uint64_t(bh) << 32 | uint32_t(t)));
    return {uint32_t(bits), uint32_t(bits >> 32)};
  }
  // `factor` where a query keeps its weight of key + step, else 0. About nine instructions; steps known to the compiler
  // need no registers of their own.
  __device__ float weight(Query of, uint32_t key, uint32_t step) const {
    constexpr uint32_t kKey = 0x9e3779b1u;
    uint32_t x = key * kKey + of.low + step * kKey;
    x = ((x ^ x >> 16) * 0x7feb352du) ^ of.high;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x >= dropped ? factor : 0.f;
  }

 private:
  static __host__ __device__ uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
};

// Bytes of shared memory for the queries of a block.
template <class Drop>
constexpr int query_bytes(int queries) {
  return Drop::kDrops ? queries * int(sizeof(Dropout::Query)) : 0;
}

}  // namespace cuda
}  // namespace igpt
