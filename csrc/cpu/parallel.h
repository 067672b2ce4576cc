// Work on all cores, through the OpenMP runtime that torch has loaded (so torch.set_num_threads rules here too).
#pragma once
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

static inline int max_threads() {
  return omp_get_max_threads();
}

// body(i, thread) for i in [0, n), handed out one at a time in increasing order. Allocate before, not inside:
// an exception must not cross the parallel region.
template <class F>
static inline void parallel_for(int64_t n, F&& body) {
  const int threads = int(n < max_threads() ? n : max_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
}

// Row 0 of parts [groups, C] becomes the sum of its rows, in their order.
static inline void sum_groups(float* parts, int64_t groups, int64_t C) {
  constexpr int64_t kColumns = 256;
  parallel_for((C + kColumns - 1) / kColumns, [&](int64_t i, int) {
    const int64_t end = (i + 1) * kColumns < C ? (i + 1) * kColumns : C;
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t c = i * kColumns; c < end; ++c) parts[c] += parts[g * C + c];
  });
}

// body(begin, end, chunk) over [0, n) in chunks of `grain`: the chunks depend on n and grain alone, never on the number
// of threads, so that partial sums kept per chunk add up to the same bits everywhere.
template <class F>
static inline void parallel_chunks(int64_t n, int64_t grain, F&& body) {
  const int64_t chunks = (n + grain - 1) / grain;
  parallel_for(chunks, [&](int64_t c, int) {
    const int64_t begin = c * grain, end = begin + grain < n ? begin + grain : n;
    body(begin, end, c);
  });
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

// Cache-line aligned, uninitialised.
template <class T>
static inline Scratch<T> scratch(int64_t count) {
  const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(p));
}
template <class T>
static inline Scratch<T> zeros(int64_t count) {
  Scratch<T> p = scratch<T>(count);
  std::memset(p.get(), 0, size_t(count) * sizeof(T));
  return p;
}
// The n elements of a vector as floats, with zeros behind them to a whole vector register. No vector: zeros.
static inline Scratch<float> floats_of(const View& vector, int64_t n) {
  Scratch<float> p = zeros<float>(padded(n));
  if (vector) load_row(p.get(), vector.data, vector.dtype, n);
  return p;
}

}  // namespace IGPT_ISA
}  // namespace igpt
