// What kernels share on the device: shared memory, elements of any float dtype, sums over a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include <type_traits>

#include "../ops.h"
#include "ptx.cuh"

// The block's dynamic shared memory as an array of T, aligned to 128 bytes, or to the 1024 after which the widest
// swizzle repeats; and static arrays. The bench that needs no GPU (tests/simt) brings its own three.
#if !defined(IGPT_SIMT)
#define DYN_SMEM(T, name)                                    \
  extern __shared__ __align__(128) char igpt_dynamic_smem[]; \
  T* name = reinterpret_cast<T*>(igpt_dynamic_smem)
#define DYN_SMEM_1024(T, name)                                     \
  extern __shared__ __align__(1024) char igpt_dynamic_smem_1024[]; \
  T* name = reinterpret_cast<T*>(igpt_dynamic_smem_1024)
#define STATIC_SMEM(T, name, count) __shared__ T name[count]
#endif

namespace igpt {
namespace cuda {

// V neighbouring elements as floats.
template <int V>
struct Floats {
  float v[V];
};

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// Their memory as it lies, in words: nvcc takes a struct apart into its elements, and moves each on its own.
template <size_t N>
using FourOrTwo = std::conditional_t<N == 4, uint32_t, uint16_t>;
template <size_t N>
using EightOrLess = std::conditional_t<N == 8, uint2, FourOrTwo<N>>;
template <class T, int V>
using Bits = std::conditional_t<sizeof(T) * V == 16, uint4, EightOrLess<sizeof(T) * V>>;

template <class T, int V>
__device__ inline Floats<V> floats_of(Bits<T, V> bits) {
  Floats<V> out;
  if constexpr (std::is_same_v<T, __nv_bfloat16> && V % 2 == 0) {  // the upper half of a float
    uint32_t pairs[V / 2];
    memcpy(pairs, &bits, sizeof(bits));
#pragma unroll
    for (int k = 0; k < V; ++k) out.v[k] = __uint_as_float(k % 2 ? pairs[k / 2] & 0xffff0000u : pairs[k / 2] << 16);
  } else {
    T raw[V];
    memcpy(raw, &bits, sizeof(bits));
#pragma unroll
    for (int k = 0; k < V; ++k) out.v[k] = float(raw[k]);
  }
  return out;
}

// Rounded to nearest even; in pairs, since one alone is converted at a quarter of the rate.
template <class T, int V>
__device__ inline Bits<T, V> bits_of(const Floats<V>& x) {
  Bits<T, V> bits;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    uint32_t pairs[V / 2];
#pragma unroll
    for (int k = 0; k < V / 2; ++k) pairs[k] = ptx::pack2<T>(x.v[2 * k], x.v[2 * k + 1]);
    memcpy(&bits, pairs, sizeof(bits));
  } else {
    T raw[V];
#pragma unroll
    for (int k = 0; k < V; ++k) raw[k] = T(x.v[k]);
    memcpy(&bits, raw, sizeof(bits));
  }
  return bits;
}

// Evict-first, for what nobody reads again soon: L2 is left to what the kernel writes. Zeros unless `given`.
template <class T, int V>
__device__ inline Bits<T, V> load_once(const void* p, int64_t i, bool given = true) {
  return given ? __ldcs(reinterpret_cast<const Bits<T, V>*>(static_cast<const T*>(p) + i)) : Bits<T, V>{};
}

template <class T, int V>
__device__ inline Floats<V> load_as(const void* p, int64_t i) {
  return floats_of<T, V>(__ldca(reinterpret_cast<const Bits<T, V>*>(static_cast<const T*>(p) + i)));
}

template <class T, int V>
__device__ inline void store_bits(void* p, int64_t i, Bits<T, V> bits) {
  __stwb(reinterpret_cast<Bits<T, V>*>(static_cast<T*>(p) + i), bits);
}

template <class T, int V>
__device__ inline void store_as(void* p, int64_t i, const Floats<V>& x) {
  store_bits<T, V>(p, i, bits_of<T, V>(x));
}

// The dtype is the same for the whole launch, so the branch never diverges. Addresses are multiples of four elements,
// or of 16 bytes: eight floats go in two halves.
template <int V>
__device__ inline Floats<V> load(const void* p, DType t, int64_t i) {
  if constexpr (V == 8) {
    const Floats<4> low = load<4>(p, t, i), high = load<4>(p, t, i + 4);
    Floats<8> both;
#pragma unroll
    for (int k = 0; k < 4; ++k) both.v[k] = low.v[k], both.v[k + 4] = high.v[k];
    return both;
  } else {
    if (t == DType::f32) return load_as<float, V>(p, i);
    if (t == DType::bf16) return load_as<__nv_bfloat16, V>(p, i);
    return load_as<__half, V>(p, i);
  }
}

template <int V>
__device__ inline void store(void* p, DType t, int64_t i, const Floats<V>& x) {
  if (t == DType::f32) return store_as<float, V>(p, i, x);
  if (t == DType::bf16) return store_as<__nv_bfloat16, V>(p, i, x);
  return store_as<__half, V>(p, i, x);
}

// The sum over a warp, to every lane, in a fixed order.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace cuda
}  // namespace igpt
