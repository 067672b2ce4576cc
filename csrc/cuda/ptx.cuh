// Inline PTX lives here and in ptx_sm90.cuh, nowhere else. Sections are those of the PTX ISA; addresses are 32-bit
// shared addresses from smem_u32. The bench that needs no GPU (tests/simt) has a host twin of every function.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(IGPT_SIMT)
#include "simt_ptx.h"
#else
#define PTX_FN __device__ __forceinline__

namespace igpt {
namespace cuda {
namespace ptx {

// "State spaces": the shared address of a pointer into the block's shared memory.
PTX_FN uint32_t smem_u32(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// "%tid.x", read where it stands: the compiler keeps neither it nor what follows from it in registers until then.
PTX_FN int thread_again() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// "cp.async": BYTES from global memory to shared memory, of which the first `given` are read and the rest are zeros
// (given = 0 reads nothing). Sixteen bytes go past L1.
template <int BYTES>
PTX_FN void cp_async(uint32_t dst, const void* src, int given = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  const size_t from = __cvta_generic_to_global(src);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(from), "r"(given) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(from), "n"(BYTES), "r"(given)
                 : "memory");
}
// "cp.async.commit_group": closes the group of this thread's copies so far.
PTX_FN void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// "cp.async.wait_group": until at most the N newest groups of this thread are in flight.
template <int N>
PTX_FN void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// "ldmatrix": N matrices of 8 x 8 16-bit elements; lane 8 m + i gives the address of row i of matrix m, and lane l
// receives row l / 4, columns 2 (l % 4) and the next, of each (of its transpose in ldmatrix_trans).
#define IGPT_LDMATRIX(name, trans)                                                             \
  template <int N>                                                                             \
  PTX_FN void name(uint32_t (&r)[N], uint32_t address) {                                       \
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");            \
    if constexpr (N == 1)                                                                      \
      asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"             \
                   : "=r"(r[0])                                                                \
                   : "r"(address)                                                              \
                   : "memory");                                                                \
    else if constexpr (N == 2)                                                                 \
      asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"         \
                   : "=r"(r[0]), "=r"(r[1])                                                    \
                   : "r"(address)                                                              \
                   : "memory");                                                                \
    else                                                                                       \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
                   : "r"(address)                                                              \
                   : "memory");                                                                \
  }
IGPT_LDMATRIX(ldmatrix, "")
IGPT_LDMATRIX(ldmatrix_trans, ".trans")
#undef IGPT_LDMATRIX

// "mma.sync" m16n8k16: d [16, 8] += a [16, 16] b [16, 8], E = bf16 or f16. With g = lane / 4 and c = 2 (lane % 4):
// d: (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1); a: pairs at (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8);
// b0, b1: pairs of rows c and c + 8 in column g.
template <class E>
PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<E, __nv_bfloat16> || std::is_same_v<E, __half>, "bf16 or f16");
#define IGPT_MMA(type)                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<E, __nv_bfloat16>)
    IGPT_MMA("bf16");
  else
    IGPT_MMA("f16");
#undef IGPT_MMA
}

// "ex2": 2^x, relative error about 2^-22, subnormals to zero.
PTX_FN float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// "cvt" to bf16x2 or f16x2: two floats, rounded to nearest even, `low` in the lower half.
template <class E>
PTX_FN uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<E, __nv_bfloat16> || std::is_same_v<E, __half>, "bf16 or f16");
  uint32_t r;
  if constexpr (std::is_same_v<E, __nv_bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// "bar{.cta}": named barriers 1 to 15 among `threads` threads (a multiple of 32); sync waits, arrive only counts.
PTX_FN void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PTX_FN void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace ptx
}  // namespace cuda
}  // namespace igpt
#endif  // IGPT_SIMT
