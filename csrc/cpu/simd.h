// Vectors of floats in the width of the instruction set that this file is compiled for.
//
// The arithmetic uses the compiler's own vector types, so that one text serves SSE2, AVX2, AVX-512, NEON and whatever
// comes; intrinsics appear only where the language has no word for the instruction (the bf16 dot product) or the
// compiler a poor one. Everything lives in the instruction set's own namespace and is static: the linker must never
// hand code compiled for a newer processor to an older one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../ops.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace igpt {
namespace IGPT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
struct bf16 {
  uint16_t bits;
};

// For p[at], p[at + step], ... of rows that follow each other in memory and are read once: asks the L2 cache for what
// comes `ahead` bytes later, a line at a time. The processor's own prefetching stops at each page of 4 KB, and asking
// L1 takes its few places for misses from the loads themselves.
template <int step = kLanes, int ahead = 8192, class T>
static inline void prefetch(const T* p, int64_t at) {
  constexpr int kRead = 0, kIntoL2 = 2, kLine = 64 / sizeof(T);
  if (step >= kLine || at % kLine == 0)
    __builtin_prefetch(reinterpret_cast<const char*>(p + at) + ahead, kRead, kIntoL2);
}

static inline vf splat(float x) {
  return x - vf{};
}
// The same anywhere in memory. A memcpy would say it too, but the compiler then keeps copies on the stack.
typedef float unaligned_vf __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
static inline vf load(const float* p) {
  return *reinterpret_cast<const unaligned_vf*>(p);
}
static inline void store(float* p, vf v) {
  *reinterpret_cast<unaligned_vf*>(p) = v;
}
static inline vf load(const bf16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // the compiler's own conversion takes halves apart and together again
  const vu u = reinterpret_cast<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) << 16;
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu u = __builtin_convertvector(h, vu) << 16;
#endif
  vf v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// Round to nearest even; NaN stays NaN.
static inline vh to_bf16(vf v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  vh out;
  std::memcpy(&out, &h, sizeof out);
  return out;
#else
  vu u;
  std::memcpy(&u, &v, sizeof u);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, vh);
#endif
}
static inline void store(bf16* p, vf v) {
  const vh h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
static inline float to_float(float x) {
  return x;
}
#if defined(__AVX512BF16__)
// Neighbouring bf16, two a lane, and their instruction: each lane adds the products of both its pairs.
typedef __m512bh vp;
constexpr int kPairs = 2 * kLanes;
static inline vp load_pairs(const bf16* p) {
  return reinterpret_cast<vp>(_mm512_loadu_si512(p));
}
static inline vp load_pairs_n(const bf16* p, int64_t n) {  // zeros behind the n-th, 0 < n
  return n >= kPairs ? load_pairs(p) : reinterpret_cast<vp>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
}
static inline vp to_pairs(vf low, vf high) {
  return _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
}
static inline vf dot_pairs(vf acc, vp x, vp y) {
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), x, y));
}
#endif
static inline float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// The first n < kLanes elements, zeros behind them.
template <class T>
static inline vf load_n(const T* p, int64_t n) {
  T full[kLanes] = {};
  std::memcpy(full, p, size_t(n) * sizeof(T));
  return load(full);
}
template <class T>
static inline void store_n(T* p, vf v, int64_t n) {
  T full[kLanes];
  store(full, v);
  std::memcpy(p, full, size_t(n) * sizeof(T));
}
// The same for n <= kLanes.
template <class T>
static inline vf load_upto(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <class T>
static inline void store_upto(T* p, vf v, int64_t n) {
  n == kLanes ? store(p, v) : store_n(p, v, n);
}

// b where either is NaN. Against a constant the compiler makes two instructions of one.
static inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
static inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// Lane i of the result is lane (i + by) mod kLanes.
template <int by>
static inline vf rotate(vf v) {
  vi from;
  for (int i = 0; i < kLanes; ++i) from[i] = (i + by) % kLanes;
#if defined(__clang__)
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[from[i]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

// Halves are folded until one lane is left: the order of the additions is fixed.
template <int width = kLanes / 2>
static inline float sum(vf v) {
  v += rotate<width>(v);
  if constexpr (width == 1)
    return v[0];
  else
    return sum<width / 2>(v);
}
// Two rows of a matrix trade: in each block of 2 width lanes, a gives its second half for b's first.
template <int width>
static IGPT_INLINE void exchange(vf& a, vf& b) {
  vi low, high;
  for (int i = 0; i < kLanes; ++i) {
    const bool first = i / width % 2 == 0;
    low[i] = first ? i : kLanes + i - width;
    high[i] = first ? i + width : kLanes + i;
  }
#if defined(__clang__)
  vf x, y;
  for (int i = 0; i < kLanes; ++i) {
    x[i] = low[i] < kLanes ? a[low[i]] : b[low[i] - kLanes];
    y[i] = high[i] < kLanes ? a[high[i]] : b[high[i] - kLanes];
  }
#else
  const vf x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
#endif
  a = x;
  b = y;
}
// Both folded to half: in each block of 2 width lanes, first a's two halves added, then b's.
template <int width>
static IGPT_INLINE vf fold(vf a, vf b) {
  exchange<width>(a, b);
  return a + b;
}
// Lane j of row i goes to lane i of row j.
template <int width = kLanes / 2>
static IGPT_INLINE void transpose(vf* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (i / width % 2 == 0) exchange<width>(v[i], v[i + width]);
  if constexpr (width > 1) transpose<width / 2>(v);
}
// Unrolled, or else the compiler keeps an array that has to live in registers in memory.
template <int count>
static IGPT_INLINE void clear(vf (&v)[count]) {
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) v[j] = vf{};
}
// Lane j of the result is sum(v[j]), to the bit, for a third of the work. v is used up.
template <int width = kLanes / 2>
static IGPT_INLINE vf sums(vf* v) {
#pragma GCC unroll 16
  for (int j = 0; j < width; ++j) v[j] = fold<width>(v[j], v[j + width]);
  if constexpr (width == 1)
    return v[0];
  else
    return sums<width / 2>(v);
}
// Lane j of the result is max(v[j]). v is used up.
template <int width = kLanes / 2>
static IGPT_INLINE vf maxes(vf* v) {
#pragma GCC unroll 16
  for (int j = 0; j < width; ++j) {
    exchange<width>(v[j], v[j + width]);
    v[j] = max(v[j], v[j + width]);
  }
  if constexpr (width == 1)
    return v[0];
  else
    return maxes<width / 2>(v);
}
template <int width = kLanes / 2>
static inline float max(vf v) {
  v = max(v, rotate<width>(v));
  if constexpr (width == 1)
    return v[0];
  else
    return max<width / 2>(v);
}

// 2^x to about 1 ulp; exactly 0 below 2^-126 (so -inf gives 0), inf from 2^128 on, NaN for NaN. x = n + f, |f| <= 1/2:
// the sum with 1.5 * 2^23 leaves n in the low mantissa bits; 2^f is a degree-6 polynomial of least relative error
// (2e-9) with p(0) = 1; n goes to the exponent.
static inline vf exp2(vf x) {
  const vf magic = splat(12582912.f);
  const vf low = max(splat(-126.f), x);  // in this order, both comparisons let NaN through
  const vf in = min(splat(128.f), low);
  const vf shifted = in + magic;
  const vf f = in - (shifted - magic);
  vf p = splat(1.53533620e-4f);
  p = p * f + 1.33988745e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033247e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.f;
  vu n, bits;  // unsigned: a NaN's bits go round
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n << 23;
  vf y;
  std::memcpy(&y, &bits, sizeof y);
  return x < splat(-126.f) ? vf{} : x == x ? y : x;  // the bits of some NaNs would come round to numbers
}

// Lane i of the result is `v` where bit i is set, else `otherwise`.
static inline vf keep(uint32_t bits, vf v, vf otherwise) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(
      _mm512_mask_mov_ps(reinterpret_cast<__m512>(otherwise), __mmask16(bits), reinterpret_cast<__m512>(v)));
#else
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  return ((vi{} + int32_t(bits)) & lane) != 0 ? v : otherwise;
#endif
}

// One row in any float dtype, to and from float: kernels of mixed dtypes compute on rows that stay in the L1 cache.
static inline void load_row(float* dst, const void* src, DType dtype, int64_t n) {
  if (dtype == DType::f32) {
    std::memcpy(dst, src, size_t(n) * sizeof(float));
    return;
  }
  const bf16* p = static_cast<const bf16*>(src);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(p + i));
  if (i < n) store_n(dst + i, load_n(p + i, n - i), n - i);
}
static inline void store_row(void* dst, const float* src, DType dtype, int64_t n) {
  if (dtype == DType::f32) {
    std::memcpy(dst, src, size_t(n) * sizeof(float));
    return;
  }
  bf16* p = static_cast<bf16*>(dst);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(p + i, load(src + i));
  if (i < n) store_n(p + i, load_n(src + i, n - i), n - i);
}
static inline int64_t bytes_of(DType t) {  // of a float
  return t == DType::f32 ? 4 : 2;
}
static inline char* row_of(const View& v, int64_t row) {
  return v.as<char>() + row * v.cols() * bytes_of(v.dtype);
}
template <class T>
static inline T* row_of(const View& v, int64_t row) {  // nullptr where there is no tensor
  return v ? v.as<T>() + row * v.cols() : nullptr;
}
// f(a float or a bf16 for each dtype): an f of `auto` parameters is compiled once for each of their types.
template <class F>
static IGPT_INLINE void by_dtype(const F& f) {
  f();
}
template <class F, class... More>
static IGPT_INLINE void by_dtype(const F& f, DType first, More... more) {
  if (first == DType::f32)
    by_dtype([&](auto... rest) { f(float{}, rest...); }, more...);
  else
    by_dtype([&](auto... rest) { f(bf16{}, rest...); }, more...);
}
static inline int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

}  // namespace IGPT_ISA
}  // namespace igpt
