// CUDA's vector types, its two 16-bit floats and its scalar intrinsics for g++, rounded as the hardware rounds.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define IGPT_VECTORS(T, name)                         \
  struct alignas(2 * sizeof(T)) name##2 {             \
    T x, y;                                           \
  };                                                  \
  struct name##3 {                                    \
    T x, y, z;                                        \
  };                                                  \
  struct alignas(4 * sizeof(T)) name##4 {             \
    T x, y, z, w;                                     \
  };                                                  \
  inline name##2 make_##name##2(T x, T y) {           \
    return {x, y};                                    \
  }                                                   \
  inline name##3 make_##name##3(T x, T y, T z) {      \
    return {x, y, z};                                 \
  }                                                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                              \
  }
IGPT_VECTORS(float, float)
IGPT_VECTORS(int, int)
IGPT_VECTORS(unsigned, uint)
IGPT_VECTORS(short, short)
IGPT_VECTORS(unsigned short, ushort)
IGPT_VECTORS(unsigned char, uchar)
IGPT_VECTORS(signed char, char)
#undef IGPT_VECTORS
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float bf16_to_float(uint16_t h) {
  return bits<float>(uint32_t(h) << 16);
}
inline uint16_t float_to_bf16(float f) {  // to nearest, ties to even; every NaN becomes the hardware's 0x7fff
  const uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline float half_to_float(uint16_t h) {
  return float(bits<_Float16>(h));
}
inline uint16_t float_to_half(float f) {
  return f != f ? uint16_t(0x7fff) : bits<uint16_t>(_Float16(f));
}

// a * b + c rounded to odd: rounding once more, to fewer bits, is then as good as rounding the exact value once.
inline float fma_odd(float a, float b, float c) {
  const double p = double(a) * double(b), s = p + double(c);  // the product of two 16-bit floats is exact
  const double t = s - p, rest = (p - (s - t)) + (double(c) - t);
  double odd = s;
  if (std::isfinite(s) && rest != 0 && !(bits<uint64_t>(s) & 1))
    odd = std::nextafter(s, rest > 0 ? INFINITY : -INFINITY);
  float f = float(odd);
  if (std::isfinite(f) && double(f) != odd && !(bits<uint32_t>(f) & 1))
    f = std::nextafter(f, double(f) < odd ? INFINITY : -INFINITY);
  return f;
}

}  // namespace simt

// The two 16-bit floats. Arithmetic goes through float: 24 bits are enough that rounding twice changes nothing.
#define IGPT_FLOAT16(name, pair, to, from)                                     \
  struct name {                                                                \
    uint16_t bits;                                                             \
    name() = default;                                                          \
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>      \
    name(T x) : bits(simt::to(float(x))) {}                                    \
    operator float() const { return simt::from(bits); }                        \
    name& operator+=(name o) { return *this = name(float(*this) + float(o)); } \
    name& operator-=(name o) { return *this = name(float(*this) - float(o)); } \
    name& operator*=(name o) { return *this = name(float(*this) * float(o)); } \
  };                                                                           \
  struct alignas(4) pair {                                                     \
    name x, y;                                                                 \
  };                                                                           \
  inline name operator+(name a, name b) {                                      \
    return name(float(a) + float(b));                                          \
  }                                                                            \
  inline name operator-(name a, name b) {                                      \
    return name(float(a) - float(b));                                          \
  }                                                                            \
  inline name operator*(name a, name b) {                                      \
    return name(float(a) * float(b));                                          \
  }                                                                            \
  inline name operator/(name a, name b) {                                      \
    return name(float(a) / float(b));                                          \
  }                                                                            \
  inline name operator-(name a) {                                              \
    a.bits ^= 0x8000;                                                          \
    return a;                                                                  \
  }                                                                            \
  inline bool operator<(name a, name b) {                                      \
    return float(a) < float(b);                                                \
  }                                                                            \
  inline bool operator>(name a, name b) {                                      \
    return float(a) > float(b);                                                \
  }                                                                            \
  inline bool operator<=(name a, name b) {                                     \
    return float(a) <= float(b);                                               \
  }                                                                            \
  inline bool operator>=(name a, name b) {                                     \
    return float(a) >= float(b);                                               \
  }                                                                            \
  inline bool operator==(name a, name b) {                                     \
    return float(a) == float(b);                                               \
  }                                                                            \
  inline bool operator!=(name a, name b) {                                     \
    return float(a) != float(b);                                               \
  }                                                                            \
  inline name __hadd(name a, name b) {                                         \
    return a + b;                                                              \
  }                                                                            \
  inline name __hsub(name a, name b) {                                         \
    return a - b;                                                              \
  }                                                                            \
  inline name __hmul(name a, name b) {                                         \
    return a * b;                                                              \
  }                                                                            \
  inline name __hneg(name a) {                                                 \
    return -a;                                                                 \
  }                                                                            \
  inline name __hfma(name a, name b, name c) {                                 \
    return name(simt::fma_odd(float(a), float(b), float(c)));                  \
  }                                                                            \
  inline name __hmax(name a, name b) {                                         \
    return name(std::fmax(float(a), float(b)));                                \
  }                                                                            \
  inline name __hmin(name a, name b) {                                         \
    return name(std::fmin(float(a), float(b)));                                \
  }                                                                            \
  inline bool __hgt(name a, name b) {                                          \
    return a > b;                                                              \
  }                                                                            \
  inline bool __hlt(name a, name b) {                                          \
    return a < b;                                                              \
  }                                                                            \
  inline bool __hisnan(name a) {                                               \
    return float(a) != float(a);                                               \
  }                                                                            \
  inline pair __hadd2(pair a, pair b) {                                        \
    return {a.x + b.x, a.y + b.y};                                             \
  }                                                                            \
  inline pair __hsub2(pair a, pair b) {                                        \
    return {a.x - b.x, a.y - b.y};                                             \
  }                                                                            \
  inline pair __hmul2(pair a, pair b) {                                        \
    return {a.x * b.x, a.y * b.y};                                             \
  }                                                                            \
  inline pair __hmax2(pair a, pair b) {                                        \
    return {__hmax(a.x, b.x), __hmax(a.y, b.y)};                               \
  }                                                                            \
  inline pair __hfma2(pair a, pair b, pair c) {                                \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                     \
  }                                                                            \
  inline float __low2float(pair a) {                                           \
    return float(a.x);                                                         \
  }                                                                            \
  inline float __high2float(pair a) {                                          \
    return float(a.y);                                                         \
  }
IGPT_FLOAT16(__nv_bfloat16, __nv_bfloat162, float_to_bf16, bf16_to_float)
IGPT_FLOAT16(__half, __half2, float_to_half, half_to_float)
#undef IGPT_FLOAT16
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

inline __nv_bfloat16 __float2bfloat16(float f) {
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  return f;
}
inline float __bfloat162float(__nv_bfloat16 h) {
  return h;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {x, y};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) {
  return {v.x, v.y};
}
inline __nv_bfloat162 __float2bfloat162_rn(float x) {
  return {x, x};
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
  return {x, y};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {v.x, v.y};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) {
  return h.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) {
  return simt::bits<__nv_bfloat16>(u);
}
inline __half __float2half(float f) {
  return f;
}
inline __half __float2half_rn(float f) {
  return f;
}
inline float __half2float(__half h) {
  return h;
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {x, y};
}
inline __half2 __float22half2_rn(float2 v) {
  return {v.x, v.y};
}
inline __half2 __float2half2_rn(float x) {
  return {x, x};
}
inline __half2 __halves2half2(__half x, __half y) {
  return {x, y};
}
inline float2 __half22float2(__half2 v) {
  return {v.x, v.y};
}
inline unsigned short __half_as_ushort(__half h) {
  return h.bits;
}
inline __half __ushort_as_half(unsigned short u) {
  return simt::bits<__half>(u);
}

inline float __int_as_float(int i) {
  return simt::bits<float>(i);
}
inline int __float_as_int(float f) {
  return simt::bits<int>(f);
}
inline float __uint_as_float(unsigned u) {
  return simt::bits<float>(u);
}
inline unsigned __float_as_uint(float f) {
  return simt::bits<unsigned>(f);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __exp2f(float x) {
  return std::exp2(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
#define IGPT_ROUNDED(T, name, op) \
  inline T name(T a, T b) {       \
    return a op b;                \
  }
IGPT_ROUNDED(float, __fsub_rn, -)
IGPT_ROUNDED(float, __fdiv_rn, /)
IGPT_ROUNDED(double, __dadd_rn, +)
IGPT_ROUNDED(double, __dsub_rn, -)
IGPT_ROUNDED(double, __dmul_rn, *)
IGPT_ROUNDED(double, __ddiv_rn, /)
#undef IGPT_ROUNDED
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline float __frsqrt_rn(float a) {
  return float(1.0 / std::sqrt(double(a)));
}
inline float rsqrtf(float a) {
  return float(1.0 / std::sqrt(double(a)));
}
inline float rsqrt(float a) {
  return rsqrtf(a);
}
inline float __saturatef(float a) {
  return a > 0.f ? (a < 1.f ? a : 1.f) : 0.f;
}
inline float __int2float_rn(int i) {
  return float(i);
}
inline float __uint2float_rn(unsigned i) {
  return float(i);
}
inline unsigned __float2uint_rn(float f) {
  return unsigned(std::nearbyint(f));
}
inline int __float2int_rn(float f) {
  return int(std::nearbyint(f));
}
inline int __float2int_rd(float f) {
  return int(std::floor(f));
}
inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}
inline int __popcll(unsigned long long v) {
  return __builtin_popcountll(v);
}
inline int __clz(int v) {
  return v ? __builtin_clz(unsigned(v)) : 32;
}
inline int __clzll(long long v) {
  return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64;
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}
inline int __ffsll(long long v) {
  return __builtin_ffsll(v);
}
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned(uint64_t(a) * b >> 32);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}

// min and max of mixed arithmetic types, as CUDA's overloads give them; a NaN loses to a number.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T v) {
  *p = v;
}
