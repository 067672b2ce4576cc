// Small matrix products on packed tiles, C [M, N] (+)= A [M, K] B [K, N], for the attention kernels.
//
// Everything is a matrix of 32-bit units: one float, or two neighbouring bf16 along K. A is row-major in units and
// broadcast, B holds kLanes columns side by side and is loaded, C is float. So one loop serves both, and only dot()
// differs. AMX multiplies the same matrices 16 x 16 units at a time: kRows and kDepth are what rows of C and elements
// along K come in there, and callers round up to.
#pragma once
#include <algorithm>

#include "amx.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

struct F32Units {
  using Unit = float;
  static constexpr int64_t kRows = 1, kDepth = 1;
  static constexpr float kBase = 1.f;    // exp(kBase x) is e^x
  static constexpr int kStep = 1;        // elements along K in a unit
  static constexpr int64_t kChunk = 64;  // units along K that are summed at once
  using Vector = vf;
  static Vector load_b(const Unit* p) { return load(p); }
  static vf dot(vf acc, Unit a, Vector b) { return a * b + acc; }
  static vf exp(vf x) { return exp2(x * kLog2e); }

  template <class T>
  static Unit unit(const T* p) {
    return to_float(*p);
  }
  template <class T>
  static vf units(const T* p) {  // kLanes of them
    return load(p);
  }
  // A row of an A matrix, two vectors from column c on: what a later product reads along K.
  static void store_a(Unit* row, int64_t c, vf v0, vf v1) { store(row + c, v0), store(row + c + kLanes, v1); }
  // Rows 2k and 2k+1 of a B matrix of N columns; kLanes elements of two rows as they are in memory.
  template <class T>
  static void copy_b_pair(Unit* b, int64_t k, int64_t N, int64_t c, const T* even, const T* odd) {
    store_b_pair(b, k, N, c, load(even), load(odd));
  }
  static void store_b_pair(Unit* b, int64_t k, int64_t N, int64_t c, vf even, vf odd) {
    store(b + 2 * k * N + c, even);
    store(b + (2 * k + 1) * N + c, odd);
  }
};

#if defined(__AVX512BF16__)
typedef int16_t vs __attribute__((vector_size(4 * kLanes)));
struct Bf16Units {
  using Unit = uint32_t;
  static constexpr int kStep = 2;
#if defined(__AMX_BF16__)
  static constexpr int64_t kRows = 16, kDepth = 32;
#else
  static constexpr int64_t kRows = 1, kDepth = 2;
#endif
  static constexpr float kBase = kLog2e;
  static constexpr int64_t kChunk = 1 << 20;  // the inputs' own rounding outweighs that of the sums
  using Vector = vp;
  static vp load_b(const Unit* p) { return reinterpret_cast<vp>(_mm512_loadu_si512(p)); }
  static vf dot(vf acc, Unit a, vp b) { return dot_pairs(acc, reinterpret_cast<vp>(_mm512_set1_epi32(int(a))), b); }
  static Unit unit(const bf16* p) {
    Unit u;
    std::memcpy(&u, p, sizeof u);
    return u;
  }
  static vf units(const bf16* p) {  // only moved, so what their bits mean as floats does not matter
    return load(reinterpret_cast<const float*>(p));
  }
  // 2^x to 3e-6, and 1 exactly for 0: what is rounded to bf16 needs no more. x = n + f, 0 <= f <= 1, and the
  // instructions know what becomes of infinities and NaN.
  static vf exp(vf x) {
    const __m512 in = reinterpret_cast<__m512>(x);
    constexpr int kDown = 9;  // to the next lower integer, quietly
    const vf f = reinterpret_cast<vf>(_mm512_reduce_ps(in, kDown));
    vf p = splat(1.34266858e-2f);
    p = p * f + 5.22424717e-2f;
    p = p * f + 2.41280206e-1f;
    p = p * f + 6.93044845e-1f;
    p = p * f + 1.f;
    return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), in));
  }
  static __m512i both(vf low, vf high) { return reinterpret_cast<__m512i>(to_pairs(low, high)); }
  // The first half's elements and the second's in turn.
  static void store_interleaved(Unit* to, __m512i halves) {
    vs from;
    for (int i = 0; i < kLanes; ++i) from[2 * i] = int16_t(i), from[2 * i + 1] = int16_t(kLanes + i);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(from), halves));
  }
  static void store_a(Unit* row, int64_t c, vf v0, vf v1) { _mm512_storeu_si512(row + c / kStep, both(v0, v1)); }
  static void copy_b_pair(Unit* b, int64_t k, int64_t N, int64_t c, const bf16* even, const bf16* odd) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
    store_interleaved(b + k * N + c, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  static void store_b_pair(Unit* b, int64_t k, int64_t N, int64_t c, vf even, vf odd) {
    store_interleaved(b + k * N + c, both(even, odd));
  }
};
using HalfUnits = Bf16Units;  // what bf16 is multiplied in
#else
using HalfUnits = F32Units;
#endif

#if defined(__AVX512F__)
constexpr int kMr = 6, kNv = 4;  // 24 accumulators of 32 registers
#else
constexpr int kMr = 6, kNv = 2;  // 12 of 16
#endif

template <class E, int MR, int NV, bool kAccumulate>
static inline void gemm_block(float* C, int64_t ldc, const typename E::Unit* A, int64_t lda, const typename E::Unit* B,
                              int64_t ldb, int64_t K) {
  vf acc[MR][NV];
// Unrolled here, or else the accumulators have a home in memory that they visit before and after the loop.
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = vf{};
  for (int64_t k = 0; k < K; ++k) {
    typename E::Vector b[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b[j] = E::load_b(B + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = E::dot(acc[i][j], A[i * lda + k], b[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      float* c = C + i * ldc + j * kLanes;
      store(c, kAccumulate ? load(c) + acc[i][j] : acc[i][j]);
    }
}

template <class E, int NV, bool kAccumulate>
static inline void gemm_strip(int64_t M, int64_t K, float* C, int64_t ldc, const typename E::Unit* A, int64_t lda,
                              const typename E::Unit* B, int64_t ldb) {
  int64_t m = 0;
  for (; m + kMr <= M; m += kMr) gemm_block<E, kMr, NV, kAccumulate>(C + m * ldc, ldc, A + m * lda, lda, B, ldb, K);
  float* c = C + m * ldc;
  const typename E::Unit* a = A + m * lda;
  switch (M - m) {
    case 1:
      return gemm_block<E, 1, NV, kAccumulate>(c, ldc, a, lda, B, ldb, K);
    case 2:
      return gemm_block<E, 2, NV, kAccumulate>(c, ldc, a, lda, B, ldb, K);
    case 3:
      return gemm_block<E, 3, NV, kAccumulate>(c, ldc, a, lda, B, ldb, K);
    case 4:
      return gemm_block<E, 4, NV, kAccumulate>(c, ldc, a, lda, B, ldb, K);
    case 5:
      return gemm_block<E, 5, NV, kAccumulate>(c, ldc, a, lda, B, ldb, K);
    default:
      return;
  }
}

template <class E, bool kAccumulate>
static inline void gemm_chunk(int64_t M, int64_t N, int64_t K, float* C, int64_t ldc, const typename E::Unit* A,
                              int64_t lda, const typename E::Unit* B, int64_t ldb) {
  int64_t n = 0;
  for (; n + kNv * kLanes <= N; n += kNv * kLanes)
    gemm_strip<E, kNv, kAccumulate>(M, K, C + n, ldc, A, lda, B + n, ldb);
#if defined(__AVX512F__)
  for (; n + 2 * kLanes <= N; n += 2 * kLanes) gemm_strip<E, 2, kAccumulate>(M, K, C + n, ldc, A, lda, B + n, ldb);
#endif
  for (; n < N; n += kLanes) gemm_strip<E, 1, kAccumulate>(M, K, C + n, ldc, A, lda, B + n, ldb);
}

#if defined(__AMX_BF16__)
// Two by two tiles of C (0 to 3; A has 4 and 5, B 6 and 7), or fewer at the ends.
template <bool kAccumulate, int MT, int NT>
static IGPT_INLINE void tile_block(int64_t K, float* C, int64_t ldc, const uint32_t* A, int64_t lda, const uint32_t* B,
                                   int64_t ldb) {
  const auto each = [&](auto&& body) {
    body(std::integral_constant<int, 0>(), C);
    if constexpr (NT > 1) body(std::integral_constant<int, 1>(), C + 16);
    if constexpr (MT > 1) body(std::integral_constant<int, 2>(), C + 16 * ldc);
    if constexpr (MT > 1 && NT > 1) body(std::integral_constant<int, 3>(), C + 16 * ldc + 16);
  };
  each([&](auto tile, float* c) {
    if constexpr (kAccumulate)
      tile_load<tile>(c, ldc);
    else
      tile_zero<tile>();
  });
  for (int64_t k = 0; k < K; k += 16) {
    tile_load<6>(B + k * ldb, ldb);
    tile_load<4>(A + k, lda);
    tile_dot<0, 4, 6>();
    if constexpr (NT > 1) {
      tile_load<7>(B + k * ldb + 16, ldb);
      tile_dot<1, 4, 7>();
    }
    if constexpr (MT > 1) {
      tile_load<5>(A + 16 * lda + k, lda);
      tile_dot<2, 5, 6>();
      if constexpr (NT > 1) tile_dot<3, 5, 7>();
    }
  }
  each([&](auto tile, float* c) { tile_store<tile>(c, ldc); });
}

template <bool kAccumulate>
static void tile_gemm(int64_t M, int64_t N, int64_t K, float* C, int64_t ldc, const uint32_t* A, int64_t lda,
                      const uint32_t* B, int64_t ldb) {
  const auto strip = [&]<int NT>(int64_t n, std::integral_constant<int, NT>) {
    int64_t m = 0;
    for (; m + 32 <= M; m += 32) tile_block<kAccumulate, 2, NT>(K, C + m * ldc + n, ldc, A + m * lda, lda, B + n, ldb);
    if (m < M) tile_block<kAccumulate, 1, NT>(K, C + m * ldc + n, ldc, A + m * lda, lda, B + n, ldb);
  };
  int64_t n = 0;
  for (; n + 32 <= N; n += 32) strip(n, std::integral_constant<int, 2>());
  if (n < N) strip(n, std::integral_constant<int, 1>());
}
#endif

// N is a multiple of kLanes; K counts units. Sums run over chunks of K that start from zero and are then added, so that
// the rounding error grows with the chunk and the number of chunks, not with their product. With AMX, M is a multiple
// of kRows; a head dim that is no multiple of kDepth goes the way of processors without it.
template <class E, bool kAccumulate>
static void gemm(int64_t M, int64_t N, int64_t K, float* C, int64_t ldc, const typename E::Unit* A, int64_t lda,
                 const typename E::Unit* B, int64_t ldb) {
#if defined(__AMX_BF16__)
  if constexpr (E::kDepth == 32)
    if (K % 16 == 0) return tile_gemm<kAccumulate>(M, N, K, C, ldc, A, lda, B, ldb);
#endif
  gemm_chunk<E, kAccumulate>(M, N, std::min(K, E::kChunk), C, ldc, A, lda, B, ldb);
  for (int64_t k = E::kChunk; k < K; k += E::kChunk)
    gemm_chunk<E, true>(M, N, std::min(K - k, E::kChunk), C, ldc, A + k, lda, B + k * ldb, ldb);
}

}  // namespace IGPT_ISA
}  // namespace igpt
