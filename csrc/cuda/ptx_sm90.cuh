// Inline PTX of sm_90a: mbarriers, bulk copies and tensor tiles (TMA), wgmma, setmaxnreg, clusters. Sections are those
// of the PTX ISA. Include it only where the code is for sm_90a; tests/simt has a host twin of every function.
#pragma once
#include <cuda.h>

#include "ptx.cuh"

#if !defined(IGPT_SIMT)
namespace igpt {
namespace cuda {
namespace ptx {

// ---- "mbarrier": eight bytes of shared memory that count `count` arrivals and the bytes of copies, phase by phase

PTX_FN void mbar_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// "membar/fence", mbarrier_init: what this thread initialised is seen by the cluster and by the async proxy.
PTX_FN void mbar_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
PTX_FN void mbar_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Expects `bytes` more in this phase, then arrives.
PTX_FN void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
PTX_FN void mbar_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// "mbarrier.try_wait": whether the phase of this parity has completed; a fresh barrier is in phase 0.
PTX_FN bool mbar_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done;
}
PTX_FN void mbar_wait(uint32_t bar, uint32_t parity) {
  while (!mbar_try_wait(bar, parity)) {
  }
}
// Arrives at the same barrier of another block of the cluster ("mapa", then mbarrier.arrive.shared::cluster).
PTX_FN void mbar_arrive_cluster(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(bar),
      "r"(rank)
      : "memory");
}
// The same for a stage that only wgmma has read: it does not order this thread's writes for the other block, which
// costs a fence of the whole GPU.
PTX_FN void mbar_free_cluster(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(bar),
      "r"(rank)
      : "memory");
}
// "membar/fence", proxy: ordinary writes to shared memory before it are seen by the async proxy (TMA, wgmma) after it.
PTX_FN void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- "cp.async.bulk": `bytes` in a row, all a multiple of 16; a load tells `bar`, a store joins a bulk group

PTX_FN void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(bar)
               : "memory");
}
PTX_FN void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(dst)),
               "r"(src), "r"(bytes)
               : "memory");
}
// To shared memory of another block: dst and bar are addresses that mapa gave for that block.
PTX_FN void bulk_to_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
      "r"(src), "r"(bytes), "r"(bar)
      : "memory");
}
// "cp.async.bulk.commit_group", "cp.async.bulk.wait_group": as cp.async, for this thread's bulk stores.
PTX_FN void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int N>
PTX_FN void bulk_wait() {  // until all but the N newest groups have written global memory
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N>
PTX_FN void bulk_wait_read() {  // until all but the N newest groups have read shared memory
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- "cp.async.bulk.tensor": tiles of 2 to 4 dimensions, coordinates innermost first; outside the tensor a load gives
// zeros and a store writes nothing, but must not begin at a negative coordinate. dst is aligned to 128 bytes; element
// (r, byte c) of a swizzled tile has address bits 4-6 XORed with bits 7-9 (128 bytes), 4-5 with 7-8 (64), 4 with 7
// (32).

#define IGPT_AT2 "{%3, %4}"
#define IGPT_AT3 "{%3, %4, %5}"
#define IGPT_AT4 "{%3, %4, %5, %6}"
#define IGPT_LOAD(rank, at, more, ...)                                                      \
  asm volatile("cp.async.bulk.tensor." rank                                                 \
               "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes" more::"r"(dst), \
               "l"(map), "r"(bar), __VA_ARGS__                                              \
               : "memory")

PTX_FN void tma_prefetch(const CUtensorMap* map) {  // "prefetch": the map itself
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
PTX_FN void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y) {
  IGPT_LOAD("2", IGPT_AT2, " [%0], [%1, " IGPT_AT2 "], [%2];", "r"(x), "r"(y));
}
PTX_FN void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y, int z) {
  IGPT_LOAD("3", IGPT_AT3, " [%0], [%1, " IGPT_AT3 "], [%2];", "r"(x), "r"(y), "r"(z));
}
PTX_FN void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y, int z, int w) {
  IGPT_LOAD("4", IGPT_AT4, " [%0], [%1, " IGPT_AT4 "], [%2];", "r"(x), "r"(y), "r"(z), "r"(w));
}
// Into the same place of every block whose bit is set, telling the same barrier of each.
PTX_FN void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, uint16_t blocks, int x, int y) {
  IGPT_LOAD("2", IGPT_AT2, ".multicast::cluster [%0], [%1, " IGPT_AT2 "], [%2], %5;", "r"(x), "r"(y), "h"(blocks));
}
PTX_FN void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, uint16_t blocks, int x, int y,
                               int z) {
  IGPT_LOAD("3", IGPT_AT3, ".multicast::cluster [%0], [%1, " IGPT_AT3 "], [%2], %6;", "r"(x), "r"(y), "r"(z),
            "h"(blocks));
}
PTX_FN void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, uint16_t blocks, int x, int y, int z,
                               int w) {
  IGPT_LOAD("4", IGPT_AT4, ".multicast::cluster [%0], [%1, " IGPT_AT4 "], [%2], %7;", "r"(x), "r"(y), "r"(z), "r"(w),
            "h"(blocks));
}
#undef IGPT_LOAD
#undef IGPT_AT2
#undef IGPT_AT3
#undef IGPT_AT4
PTX_FN void tma_store(const CUtensorMap* map, uint32_t src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src),
               "r"(x), "r"(y)
               : "memory");
}
PTX_FN void tma_store(const CUtensorMap* map, uint32_t src, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(src), "r"(x), "r"(y), "r"(z)
               : "memory");
}
PTX_FN void tma_store(const CUtensorMap* map, uint32_t src, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(src), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// ---- "setmaxnreg": by every warp of a warpgroup

template <int N>
PTX_FN void reg_alloc() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
PTX_FN void reg_dealloc() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Clusters: "%cluster_ctarank", "%cluster_nctarank", "barrier.cluster", "mapa", "ld", "st"

PTX_FN uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
PTX_FN uint32_t cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
PTX_FN void cluster_arrive() {  // releases what this thread wrote
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
PTX_FN void cluster_wait() {  // acquires what the others wrote before they arrived
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address in the cluster's window of the same shared memory in block `rank`.
PTX_FN uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
PTX_FN uint32_t ld_cluster(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
PTX_FN void st_cluster(uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

}  // namespace ptx
}  // namespace cuda
}  // namespace igpt
#endif  // IGPT_SIMT

namespace igpt {
namespace cuda {
namespace ptx {

PTX_FN void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// "Matrix descriptor": where a wgmma operand lies. With a swizzle, rows of 128, 64 or 32 bytes in groups of eight, each
// group starting at a multiple of eight rows. K-major: sbo apart along M or N, lbo unused. MN-major: sbo apart along K,
// lbo from one row's worth of M or N to the next. Without a swizzle, core matrices of 8 x 16 bytes: K-major sbo apart
// along M or N and lbo along K; MN-major lbo along K and sbo along M or N. All in bytes.
enum class Swizzle : uint64_t { none = 0, b128 = 1, b64 = 2, b32 = 3 };
PTX_FN uint64_t matrix_descriptor(uint32_t address, uint32_t lbo, uint32_t sbo, Swizzle swizzle) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(lbo >> 4 & 0x3fff) << 16 | uint64_t(sbo >> 4 & 0x3fff) << 32 |
         uint64_t(swizzle) << 62;
}

}  // namespace ptx
}  // namespace cuda
}  // namespace igpt

#if !defined(IGPT_SIMT)
#include "ptx_wgmma.cuh"
#endif
