// What kernels share on the device: shared memory, elements of any float dtype, sums over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../ops.h"

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

// Sixteen and eight bytes by intrinsics: nvcc may split the store of a struct into four.
template <class T, int V>
__device__ inline void store_as(void* p, int64_t i, const Floats<V>& x) {
  Pack<T, V> raw;
#pragma unroll
  for (int k = 0; k < V; ++k) raw.v[k] = T(x.v[k]);
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
