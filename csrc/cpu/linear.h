// The product of a few rows with a weight matrix, for linear.cpp and decode_step.cpp.
//
// Every y[n, m] is summed in an order that K alone decides, so a row's bits do not depend on which rows stand beside
// it: sampling an image alone or in a batch gives the same image.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

// What is multiplied: floats, or, where the processor has the instruction and both sides are bf16, pairs of bf16.
template <class W>
struct Wide {
  using X = float;
  using Vector = vf;
  static constexpr int kStep = kLanes;
  static Vector load(const W* w) { return IGPT_ISA::load(w); }
  static Vector load_n(const W* w, int64_t n) { return IGPT_ISA::load_n(w, n); }
  static vf load_x(const float* x) { return IGPT_ISA::load(x); }
  static vf dot(vf acc, vf x, Vector w) { return acc + x * w; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  using X = bf16;
  using Vector = vp;
  static constexpr int kStep = kPairs;
  static vp load(const bf16* p) { return load_pairs(p); }
  static vp load_n(const bf16* w, int64_t n) { return load_pairs_n(w, n); }
  static vp load_x(const bf16* x) { return load_pairs(x); }
  static vf dot(vf acc, vp x, vp w) { return dot_pairs(acc, x, w); }
};
using HalfRows = Pairs;  // what rows of bf16 are multiplied in
#else
using HalfRows = Wide<bf16>;
#endif

// Columns of x, with the zeros behind them that dots() reads.
template <class E>
static inline int64_t padded_for(int64_t K) {
  return (K + E::kStep - 1) / E::kStep * E::kStep;
}

constexpr int64_t kOutputs = 16;     // weight rows a task
constexpr int64_t kMostGroups = 16;  // of four rows of x that share a copy of them

// Adds to lane sum i M + j the products of x's row i and w's row j, over K elements. x is padded with zeros to Kp; w's
// rows, `stride` apart, are not. Rows behind the last repeat it; their sums are not used.
//
// One or two rows of x wait for memory: they take a weight row at a time, so that memory is read in its order: what no
// cache holds comes faster then. Four keep the multipliers busy: all their products go on at once, each of them in the
// same order, because a vector that is loaded serves four, and a sum need not wait for the one before.
template <class E, int N, class W>
static IGPT_INLINE void add_products(vf (&acc)[kLanes], const typename E::X* x, int64_t Kp, const W* w, int64_t stride,
                                     int64_t K, int64_t ms) {
  constexpr int M = kLanes / N, kRows = N < 4 ? 1 : M;
#pragma GCC unroll 16
  for (int j0 = 0; j0 < M; j0 += kRows) {
    const W* row[kRows];
    for (int j = 0; j < kRows; ++j) row[j] = w + std::min<int64_t>(j0 + j, ms - 1) * stride;
    const auto step = [&](int64_t k, auto load) IGPT_INLINED {
      typename E::Vector v[kRows];
      for (int j = 0; j < kRows; ++j) v[j] = load(row[j] + k);
      for (int i = 0; i < N; ++i) {
        const auto xv = E::load_x(x + i * Kp + k);
        for (int j = 0; j < kRows; ++j) acc[i * M + j0 + j] = E::dot(acc[i * M + j0 + j], xv, v[j]);
      }
    };
    int64_t k = 0;
    for (; k + E::kStep <= K; k += E::kStep) {
      for (int j = 0; j < kRows; ++j) prefetch<E::kStep>(row[j], k);
      step(k, [](const W* p) { return E::load(p); });
    }
    if (k < K) step(k, [&](const W* p) { return E::load_n(p, K - k); });
  }
}

// N rows of x at a time, `groups` times from row n on, with weight rows begin..end.
//
// Many groups would read rows that are longer than the L1 cache holds from L2 each time, and rows a power of two apart
// share its places. So a block of the weights' columns is copied there for all of them, one after the other; the sums
// wait in memory for the next block. They add up as if whole.
template <class E, int N, class W, class Sink>
static inline void multiply_rows(const typename E::X* x, int64_t n, int64_t groups, int64_t Kp, const W* weight,
                                 int64_t K, int64_t begin, int64_t end, Sink&& sink) {
  constexpr int M = kLanes / N;
  constexpr int64_t kBlock = 2048 / sizeof(W), kStride = kBlock + 64 / sizeof(W);
  const bool copies = N == 4 && groups >= kMostGroups / 2 && K > kBlock * 5 / 4;
  alignas(64) W copy[N == 4 ? kOutputs * kStride : 1];
  vf waiting[N == 4 ? kMostGroups : 1][kOutputs / M][kLanes];
  int64_t k = 0;
  do {
    const int64_t length = copies ? std::min(kBlock, K - k) : K, stride = copies ? kStride : K;
    const bool last = k + length == K;
    const W* w = copies ? copy : weight + begin * K;
    for (int64_t m = begin; copies && m < end; ++m)
      std::memcpy(copy + (m - begin) * kStride, weight + m * K + k, size_t(length) * sizeof(W));
    for (int64_t g = 0; g < groups; ++g) {
      float y[N][kOutputs], lanes[kLanes];
      for (int64_t m = 0; m < end - begin; m += M) {
        vf acc[kLanes];
        clear(acc);
        if (k > 0) std::copy_n(waiting[g][m / M], kLanes, acc);
        add_products<E, N>(acc, x + (n + g * N) * Kp + k, Kp, w + m * stride, stride, length,
                           std::min<int64_t>(M, end - begin - m));
        if (!last) {
          std::copy_n(acc, kLanes, waiting[g][m / M]);
          continue;
        }
        store(lanes, sums(acc));
        for (int i = 0; i < N; ++i) std::memcpy(y[i] + m, lanes + i * M, M * sizeof(float));
      }
      for (int i = 0; last && i < N; ++i) sink(n + g * N + i, y[i]);
    }
    k += length;
  } while (k < K);
}

template <class E>
constexpr bool kTiles = false;

#if defined(__AMX_BF16__)
// Where the matrix unit multiplies: weights are A, as they are in memory, and x^T is B. Its rows are packed for that,
// 16 at a time: a few KB beside the weights' MB.
template <>
inline constexpr bool kTiles<Pairs> = true;

// [blocks, K / 2, 16] units of x's rows, zeros behind the last.
static inline void pack_columns(uint32_t* b, const bf16* x, int64_t N, int64_t K) {
  for (int64_t n0 = 0; n0 < N; n0 += 16, b += K / 2 * 16)
    for (int64_t k = 0; k < K; k += 32) {
      vf v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        v[i] = n0 + i < N ? load(reinterpret_cast<const float*>(x + (n0 + i) * K + k)) : vf{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(b + (k / 2 + i) * 16), v[i]);
    }
}
// 16 rows of the weight with `blocks` times 16 rows of x. The weights of the next 16 rows are asked for meanwhile.
template <int blocks, class Sink>
static inline void multiply_tiles(const uint32_t* b, int64_t n0, int64_t N, const bf16* w, int64_t K, Sink&& sink) {
  const auto each = [](auto&& body) {
    [&]<int... block>(std::integer_sequence<int, block...>) {
      (body(std::integral_constant<int, block>()), ...);
    }(std::make_integer_sequence<int, blocks>());
  };
  each([](auto block) { tile_zero<block>(); });
  for (int64_t k = 0; k < K; k += 32) {
    for (int64_t r = 16; r < 32; ++r) __builtin_prefetch(w + r * K + k, 0, 2);
    tile_load<4>(w + k, K / 2);
    each([&](auto block) {
      tile_load<5 + block % 2>(b + (block * K / 2 + k / 2) * 16, 16);
      tile_dot<block, 4, 5 + block % 2>();
    });
  }
  each([&](auto block) {
    alignas(64) float y[16][16];  // [weight's row, x's row]
    tile_store<block>(y[0], 16);
    vf v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = load(y[i]);
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(y[i], v[i]);
    for (int64_t n = n0 + block * 16; n < std::min(N, n0 + block * 16 + 16); ++n) sink(n, y[n - n0 - block * 16]);
  });
}
#endif

template <class E>
static inline bool on_tiles(int64_t K) {
  return kTiles<E> && K % 32 == 0;
}
// Units of room that multiply() wants beside x, for prepare() to fill.
template <class E>
static inline int64_t room_for(int64_t N, int64_t K) {
  return on_tiles<E>(K) ? (N + 15) / 16 * 16 * (K / 2) : 0;
}
template <class E>
static inline void prepare(uint32_t* room, const typename E::X* x, int64_t N, int64_t K) {
  if constexpr (kTiles<E>)
    if (on_tiles<E>(K)) pack_columns(room, x, N, K);
}

// x [N, Kp] times the rows begin..end of weight [M, K], at most kOutputs of them. sink(n, y): y holds row n of the
// product, columns begin..end. Four rows of x at a time, so that a weight is loaded and converted once for all four.
// `prepared` is x, by prepare(); the thread has a MatrixUnit. K and the weight's row alone decide who multiplies.
template <class E, class W, class Sink>
static inline void multiply(const typename E::X* x, const uint32_t* prepared, int64_t N, int64_t Kp, const W* weight,
                            int64_t K, int64_t begin, int64_t end, Sink&& sink) {
  static_assert(kOutputs % kLanes == 0);
  int64_t n = 0;
  if constexpr (kTiles<E>)
    if (on_tiles<E>(K) && end - begin == 16) {
      const bf16* w = weight + begin * K;
      const auto b = [&] { return prepared + n * (K / 2); };
      for (; n + 48 < N; n += 64) multiply_tiles<4>(b(), n, N, w, K, sink);
      if (n + 32 < N) return multiply_tiles<3>(b(), n, N, w, K, sink);
      if (n + 16 < N) return multiply_tiles<2>(b(), n, N, w, K, sink);
      if (n < N) multiply_tiles<1>(b(), n, N, w, K, sink);
      return;
    }
  for (int64_t fours; (fours = std::min((N - n) / 4, kMostGroups)) > 0; n += fours * 4)
    multiply_rows<E, 4>(x, n, fours, Kp, weight, K, begin, end, sink);
  for (; n + 2 <= N; n += 2) multiply_rows<E, 2>(x, n, 1, Kp, weight, K, begin, end, sink);
  if (n < N) multiply_rows<E, 1>(x, n, 1, Kp, weight, K, begin, end, sink);
}

}  // namespace IGPT_ISA
}  // namespace igpt
