// What kernels share on the device: shared memory, elements of any float dtype, sums over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

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

template <class T, int V>
__device__ inline Floats<V> load_as(const void* p, int64_t i) {
  const Pack<T, V> raw = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p) + i);
  Floats<V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out.v[k] = float(raw.v[k]);
  return out;
}

// Memory as it lies, to be converted when it is needed: then a load may be on its way for long. Whole vectors by
// intrinsics, since nvcc may split a struct into its elements.
template <class P>
__device__ inline P load_raw(const P* at) {
  P raw;
  if constexpr (sizeof(P) == 16)
    *reinterpret_cast<uint4*>(&raw) = *reinterpret_cast<const uint4*>(at);
  else if constexpr (sizeof(P) == 8)
    *reinterpret_cast<uint2*>(&raw) = *reinterpret_cast<const uint2*>(at);
  else
    raw = *at;
  return raw;
}

// The same, evict-first, of what nobody reads again soon: L2 is left to what this kernel writes. Zeros unless `given`.
template <class T, int V>
__device__ inline Pack<T, V> load_once(const void* p, int64_t i, bool given = true) {
  const Pack<T, V>* at = reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p) + i);
  if constexpr (sizeof(*at) == 16) {
    const uint4 bits = given ? __ldcs(reinterpret_cast<const uint4*>(at)) : uint4{};
    return reinterpret_cast<const Pack<T, V>&>(bits);
  } else if constexpr (sizeof(*at) == 8) {
    const uint2 bits = given ? __ldcs(reinterpret_cast<const uint2*>(at)) : uint2{};
    return reinterpret_cast<const Pack<T, V>&>(bits);
  } else {
    return given ? *at : Pack<T, V>{};
  }
}

template <class T, int V>
__device__ inline Floats<V> floats_of(const Pack<T, V>& raw) {
  Floats<V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out.v[k] = float(raw.v[k]);
  return out;
}

// In pairs: one alone is converted at a quarter of the rate.
template <class T, int V>
__device__ inline Pack<T, V> pack_as(const Floats<V>& x) {
  Pack<T, V> raw;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      const uint32_t pair = ptx::pack2<T>(x.v[k], x.v[k + 1]);
      memcpy(&raw.v[k], &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) raw.v[k] = T(x.v[k]);
  }
  return raw;
}

// Sixteen and eight bytes by intrinsics: nvcc may split the store of a struct into four.
template <class T, int V>
__device__ inline void store_as(void* p, int64_t i, const Floats<V>& x) {
  const Pack<T, V> raw = pack_as<T, V>(x);
  T* at = static_cast<T*>(p) + i;
  if constexpr (sizeof(raw) == 16)
    __stwb(reinterpret_cast<uint4*>(at), *reinterpret_cast<const uint4*>(&raw));
  else if constexpr (sizeof(raw) == 8)
    __stwb(reinterpret_cast<uint2*>(at), *reinterpret_cast<const uint2*>(&raw));
  else
    *reinterpret_cast<Pack<T, V>*>(at) = raw;
}

// The dtype is the same for the whole launch, so the branch never diverges.
template <int V>
__device__ inline Floats<V> load(const void* p, DType t, int64_t i) {
  if (t == DType::f32) return load_as<float, V>(p, i);
  if (t == DType::bf16) return load_as<__nv_bfloat16, V>(p, i);
  return load_as<__half, V>(p, i);
}

template <int V>
__device__ inline void store(void* p, DType t, int64_t i, const Floats<V>& x) {
  if (t == DType::f32) return store_as<float, V>(p, i, x);
  if (t == DType::bf16) return store_as<__nv_bfloat16, V>(p, i, x);
  return store_as<__half, V>(p, i, x);
}

// The sum over a block of at most 1024 threads, to every thread, in a fixed order. `warps` is 32 floats of shared
// memory.
__device__ inline float block_sum(float x, float* warps) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // the last sum's readers are done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) total += warps[w];
  return total;
}

}  // namespace cuda
}  // namespace igpt
