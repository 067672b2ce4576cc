// The host twin of csrc/cuda/ptx.cuh and ptx_sm90.cuh: the same names and signatures, the meaning by the PTX ISA.
#pragma once
#include "simt_device.h"

struct CUtensorMap;

namespace simt {

uint32_t shared_address(const void* p);
void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t given);
void copy_commit();
void copy_wait(uint32_t newest);  // until at most that many groups are in flight
void load_matrices(uint32_t* r, int count, bool transpose, uint32_t address, const char* file, int line);
void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16, const char* file, int line);
void named_sync(int id, int threads, const char* file, int line);
void named_arrive(int id, int threads, const char* file, int line);

void mbarrier_init(uint32_t at, uint32_t count);
void mbarrier_fence();  // what this thread initialised becomes visible to the async proxy and the cluster
void mbarrier_arrive(uint32_t at, uint32_t expect_bytes);
void mbarrier_expect(uint32_t at, uint32_t bytes);
void mbarrier_wait(uint32_t at, uint32_t parity, const char* file, int line);
void fence_async();

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier);
void bulk_store(void* to, uint32_t from, uint32_t bytes);
void bulk_to_cluster(uint32_t to, uint32_t from, uint32_t bytes, uint32_t mbarrier);
void bulk_commit();
void bulk_wait(uint32_t newest);
void tensor_load(uint32_t to, const CUtensorMap* map, const int* at, uint32_t rank, uint32_t mbarrier, uint32_t blocks);
void tensor_store(const CUtensorMap* map, const int* at, uint32_t rank, uint32_t from);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(uint32_t newest, const char* file, int line);
void wgmma(float* d, uint32_t n, bool bf16, const uint32_t* fragment, uint64_t a, uint64_t b, int accumulate,
           bool a_mn_major, bool b_mn_major, const char* file, int line);

void cluster_arrive(const char* file, int line);
void cluster_wait(const char* file, int line);
uint32_t cluster_rank();
uint32_t cluster_size();
uint32_t map_to_rank(uint32_t address, uint32_t rank);
void cluster_load(uint32_t address, void* to, uint32_t bytes);
void cluster_store(uint32_t address, const void* from, uint32_t bytes);

}  // namespace simt

#define PTX_FN inline

namespace igpt {
namespace cuda {
namespace ptx {

template <class E>
constexpr bool is_bf16() {
  static_assert(std::is_same_v<E, __nv_bfloat16> || std::is_same_v<E, __half>, "bf16 or f16");
  return std::is_same_v<E, __nv_bfloat16>;
}

inline uint32_t smem_u32(const void* p) {
  return simt::shared_address(p);
}
inline int thread_again() {
  return int(threadIdx.x);
}
template <int BYTES>
inline void cp_async(uint32_t dst, const void* src, int given = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::copy_async(dst, src, BYTES, uint32_t(given));
}
inline void cp_async_commit() {
  simt::copy_commit();
}
template <int N>
inline void cp_async_wait() {
  simt::copy_wait(N);
}
template <int N>
inline void ldmatrix(uint32_t (&r)[N], uint32_t address, SIMT_HERE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  simt::load_matrices(r, N, false, address, file, line);
}
template <int N>
inline void ldmatrix_trans(uint32_t (&r)[N], uint32_t address, SIMT_HERE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  simt::load_matrices(r, N, true, address, file, line);
}
template <class E>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
  simt::multiply(d, a, b0, b1, is_bf16<E>(), file, line);
}
inline float ex2(float x) {
  return std::exp2(x);
}
template <class E>
inline uint32_t pack2(float low, float high) {
  return uint32_t(E(high).bits) << 16 | E(low).bits;
}
inline void bar_sync(int id, int threads, SIMT_HERE) {
  simt::named_sync(id, threads, file, line);
}
inline void bar_arrive(int id, int threads, SIMT_HERE) {
  simt::named_arrive(id, threads, file, line);
}

inline void mbar_init(uint32_t bar, uint32_t count) {
  simt::mbarrier_init(bar, count);
}
inline void mbar_fence_init() {
  simt::mbarrier_fence();
}
inline void mbar_arrive(uint32_t bar) {
  simt::mbarrier_arrive(bar, 0);
}
inline void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  simt::mbarrier_arrive(bar, bytes);
}
inline void mbar_expect_tx(uint32_t bar, uint32_t bytes) {
  simt::mbarrier_expect(bar, bytes);
}
inline bool mbar_try_wait(uint32_t bar, uint32_t parity, SIMT_HERE) {
  simt::mbarrier_wait(bar, parity, file, line);  // the hardware may wait inside too; here it always waits long enough
  return true;
}
inline void mbar_wait(uint32_t bar, uint32_t parity, SIMT_HERE) {
  simt::mbarrier_wait(bar, parity, file, line);
}
inline void mbar_arrive_cluster(uint32_t bar, uint32_t rank) {
  simt::mbarrier_arrive(simt::map_to_rank(bar, rank), 0);
}
inline void mbar_free_cluster(uint32_t bar, uint32_t rank) {
  mbar_arrive_cluster(bar, rank);
}
inline void fence_proxy_async() {
  simt::fence_async();
}

inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  simt::bulk_load(dst, src, bytes, bar);
}
inline void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  simt::bulk_store(dst, src, bytes);
}
inline void bulk_to_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
  simt::bulk_to_cluster(dst, src, bytes, bar);
}
inline void bulk_commit() {
  simt::bulk_commit();
}
template <int N>
inline void bulk_wait() {
  simt::bulk_wait(N);
}
template <int N>
inline void bulk_wait_read() {
  simt::bulk_wait(N);
}
inline void tma_prefetch(const CUtensorMap*) {}
template <class... I>
inline void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, I... at) {
  static_assert(sizeof...(I) >= 2 && sizeof...(I) <= 4, "tiles of 2 to 4 dimensions");
  const int where[] = {int(at)...};
  simt::tensor_load(dst, map, where, sizeof...(I), bar, 0);
}
template <class... I>
inline void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, uint16_t blocks, I... at) {
  static_assert(sizeof...(I) >= 2 && sizeof...(I) <= 4, "tiles of 2 to 4 dimensions");
  const int where[] = {int(at)...};
  simt::tensor_load(dst, map, where, sizeof...(I), bar, blocks);
}
template <class... I>
inline void tma_store(const CUtensorMap* map, uint32_t src, I... at) {
  static_assert(sizeof...(I) >= 2 && sizeof...(I) <= 4, "tiles of 2 to 4 dimensions");
  const int where[] = {int(at)...};
  simt::tensor_store(map, where, sizeof...(I), src);
}

template <int N>
inline void reg_alloc() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
}
template <int N>
inline void reg_dealloc() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
}
inline void wgmma_fence() {
  simt::wgmma_fence();
}
inline void wgmma_commit() {
  simt::wgmma_commit();
}
template <int N>
inline void wgmma_wait(SIMT_HERE) {
  simt::wgmma_wait(N, file, line);
}
template <int N>
inline void hold_registers(float (&)[N]) {}  // g++ sees the wait as a call, which it moves nothing across
template <int N>
inline void still_wanted(const uint32_t (&)[N][4]) {}  // for an assembler that is not here
inline void still_wanted(uint32_t) {}
template <int N, class E, int A_MN = 0, int B_MN = 0>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate, SIMT_HERE) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "wgmma of this width is not wrapped");
  simt::wgmma(d, N, is_bf16<E>(), nullptr, a, b, accumulate, A_MN, B_MN, file, line);
}
template <int N, class E, int B_MN = 0>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate, SIMT_HERE) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "wgmma of this width is not wrapped");
  simt::wgmma(d, N, is_bf16<E>(), a, 0, b, accumulate, false, B_MN, file, line);
}

inline uint32_t cluster_rank() {
  return simt::cluster_rank();
}
inline uint32_t cluster_size() {
  return simt::cluster_size();
}
inline void cluster_arrive(SIMT_HERE) {
  simt::cluster_arrive(file, line);
}
inline void cluster_wait(SIMT_HERE) {
  simt::cluster_wait(file, line);
}
inline uint32_t mapa(uint32_t address, uint32_t rank) {
  return simt::map_to_rank(address, rank);
}
inline uint32_t ld_cluster(uint32_t address) {
  uint32_t v;
  simt::cluster_load(address, &v, sizeof v);
  return v;
}
inline void st_cluster(uint32_t address, uint32_t v) {
  simt::cluster_store(address, &v, sizeof v);
}

}  // namespace ptx
}  // namespace cuda
}  // namespace igpt
