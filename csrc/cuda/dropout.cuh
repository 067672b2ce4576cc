// Which of a softmax's weights a dropout keeps, for the attention kernels.
#pragma once
#include "../common/dropout.h"

namespace igpt {
namespace cuda {

// Keeps all: a kernel for it has no trace of dropout.
struct NoDropout {
  static constexpr bool kDrops = false;
};

struct Dropout : Draws {
  static constexpr bool kDrops = true;
  struct alignas(8) Query {  // what its keys are mixed with
    uint32_t low, high;
  };
  using Draws::Draws;
  __device__ Query drawn(int bh, int t) const {
    const uint64_t bits = query(bh, uint32_t(t));
    return {uint32_t(bits), uint32_t(bits >> 32)};
  }
  // `factor` where a query keeps its weight of key + step, else 0. About nine instructions; steps known to the compiler
  // need no registers of their own.
  __device__ float weight(Query of, uint32_t key, uint32_t step) const {
    uint32_t x = key * kKey + of.low + step * kKey;
    x = ((x ^ x >> 16) * kFirst) ^ of.high;
    x = (x ^ x >> 15) * kSecond;
    return x >= dropped ? factor : 0.f;
  }
};

// Bytes of shared memory for the queries of a block.
template <class Drop>
constexpr int query_bytes(int queries) {
  return Drop::kDrops ? queries * int(sizeof(Dropout::Query)) : 0;
}

}  // namespace cuda
}  // namespace igpt
