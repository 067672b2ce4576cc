// The wrappers of ptx_sm90.cuh, each alone; the formulas are in tests/simt/test_layouts_sm90.py.
#include "device.cuh"
#include "entry.h"
#include "launch.h"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace igpt {
namespace cuda {
namespace {

// One tile of a 16-bit tensor into shared memory, dumped as it lies there; with store, one from shared memory holding
// 1, 2, 3, … in place after place. Every block of a cluster receives it when multicast.
template <int RANK, bool STORE>
__global__ void tile_kernel(const __grid_constant__ CUtensorMap map, uint16_t* out, int bytes, int4 at, int multicast) {
  DYN_SMEM_1024(unsigned char, s);
  STATIC_SMEM(uint64_t, bar, 1);
  const uint32_t dst = ptx::smem_u32(s), full = ptx::smem_u32(bar);
  uint16_t* words = reinterpret_cast<uint16_t*>(s);
  if constexpr (STORE) {
    for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) words[i] = uint16_t(i + 1);
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      if constexpr (RANK == 2)
        ptx::tma_store(&map, dst, at.x, at.y);
      else if constexpr (RANK == 3)
        ptx::tma_store(&map, dst, at.x, at.y, at.z);
      else
        ptx::tma_store(&map, dst, at.x, at.y, at.z, at.w);
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      ptx::bulk_wait<0>();
    }
  } else {
    if (threadIdx.x == 0) {
      ptx::tma_prefetch(&map);
      ptx::mbar_init(full, 1);
      ptx::mbar_fence_init();
      ptx::mbar_arrive_expect_tx(full, uint32_t(bytes));
    }
    ptx::cluster_sync();
    if (threadIdx.x == 0 && (!multicast || ptx::cluster_rank() == 0)) {
      const auto mask = uint16_t(multicast);
      if constexpr (RANK == 2) {
        if (multicast)
          ptx::tma_load_multicast(dst, &map, full, mask, at.x, at.y);
        else
          ptx::tma_load(dst, &map, full, at.x, at.y);
      } else if constexpr (RANK == 3) {
        if (multicast)
          ptx::tma_load_multicast(dst, &map, full, mask, at.x, at.y, at.z);
        else
          ptx::tma_load(dst, &map, full, at.x, at.y, at.z);
      } else {
        if (multicast)
          ptx::tma_load_multicast(dst, &map, full, mask, at.x, at.y, at.z, at.w);
        else
          ptx::tma_load(dst, &map, full, at.x, at.y, at.z, at.w);
      }
    }
    ptx::mbar_wait(full, 0);
    for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) out[blockIdx.x * (bytes / 2) + i] = words[i];
    ptx::cluster_sync();
  }
}

// One wgmma by one warpgroup on operand images a [a_bytes] and b [b_bytes] that are copied to shared memory as they
// are; d [128, N / 2] register by register. The image of A is followed by that of B at the next multiple of 1024.
template <int N, class E, int A_MN, int B_MN>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const uint16_t* a, const uint16_t* b, const uint32_t* fragments, float* d, int a_bytes, int b_bytes,
                 int4 strides, int2 modes, int accumulate) {
  DYN_SMEM_1024(unsigned char, s);
  const int t = threadIdx.x, from_b = (a_bytes + 1023) / 1024 * 1024;
  for (int i = t; i < a_bytes / 2; i += 128) reinterpret_cast<uint16_t*>(s)[i] = a[i];
  for (int i = t; i < b_bytes / 2; i += 128) reinterpret_cast<uint16_t*>(s + from_b)[i] = b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = accumulate ? d[t * (N / 2) + i] : 0.f;
  const uint64_t db = ptx::matrix_descriptor(ptx::smem_u32(s + from_b), strides.z, strides.w, ptx::Swizzle(modes.y));
  ptx::wgmma_fence();
  if (fragments) {
    const uint32_t f[1][4] = {{fragments[4 * t], fragments[4 * t + 1], fragments[4 * t + 2], fragments[4 * t + 3]}};
    ptx::wgmma<N, E, B_MN>(acc, f[0], db, accumulate);
    ptx::still_wanted(f);
  } else {
    const uint64_t da = ptx::matrix_descriptor(ptx::smem_u32(s), strides.x, strides.y, ptx::Swizzle(modes.x));
    ptx::wgmma<N, E, A_MN, B_MN>(acc, da, db, accumulate);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::hold_registers(acc);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[t * (N / 2) + i] = acc[i];
}

// Ping-pong between two groups of warps through two mbarriers: group 0 writes round r, group 1 answers. out [rounds,
// 32]
__global__ void phases_kernel(int* out, int rounds) {
  STATIC_SMEM(uint64_t, bars, 2);
  STATIC_SMEM(int, slot, 32);
  const uint32_t full = ptx::smem_u32(&bars[0]), empty = ptx::smem_u32(&bars[1]);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    ptx::mbar_init(full, 32);
    ptx::mbar_init(empty, 1);
    ptx::mbar_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int r = 0; r < rounds; ++r) {
      ptx::mbar_wait(empty, uint32_t(r % 2) ^ 1u);  // the first wait passes: the phase before the first counts as done
      slot[lane] = 100 * r + lane;
      ptx::mbar_arrive(full);
    }
  } else {
    for (int r = 0; r < rounds; ++r) {
      while (!ptx::mbar_try_wait(full, uint32_t(r % 2))) {
      }
      out[32 * r + lane] = slot[31 - lane];
      __syncwarp();
      if (lane == 0) ptx::mbar_arrive(empty);
    }
  }
}

// Bulk copies: global → shared → (the next block's shared memory →) global. in, out [blocks, 64]; MUT 1: no cluster
// barrier between the initialisation of a neighbour's mbarrier and its use; 2: no wait at the end, so a block may leave
// while its neighbour still reads it; 3: no fence between ordinary writes and the copy that reads them.
template <int MUT>
__global__ void ring_kernel(const float* in, float* out) {
  STATIC_SMEM(uint64_t, bars, 2);
  DYN_SMEM(float, s);  // [4, 64]
  const uint32_t loaded = ptx::smem_u32(&bars[0]), received = ptx::smem_u32(&bars[1]), rank = ptx::cluster_rank();
  const uint32_t next = (rank + 1) % ptx::cluster_size(), bytes = 64 * sizeof(float);
  const int t = threadIdx.x, row = blockIdx.x * 64;
  if (t == 0) {
    ptx::mbar_init(loaded, 1);
    ptx::mbar_init(received, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(loaded, bytes);
    ptx::bulk_load(ptx::smem_u32(s), in + row, bytes, loaded);
    ptx::mbar_expect_tx(received, bytes);
    ptx::mbar_arrive(received);
  }
  if (MUT == 1)
    __syncthreads();
  else
    ptx::cluster_sync();
  ptx::mbar_wait(loaded, 0);
  s[64 + t] = s[t] + float(rank);
  if (MUT != 3) ptx::fence_proxy_async();
  __syncthreads();
  if (t == 0)
    ptx::bulk_to_cluster(ptx::mapa(ptx::smem_u32(s + 128), next), ptx::smem_u32(s + 64), bytes,
                         ptx::mapa(received, next));
  ptx::mbar_wait(received, 0);
  ptx::st_cluster(ptx::mapa(ptx::smem_u32(s + 192 + t), next), __float_as_uint(s[128 + t]));
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const float back = __uint_as_float(ptx::ld_cluster(ptx::mapa(ptx::smem_u32(s + 255 - t), next)));
  if (MUT != 2) ptx::cluster_sync();
  s[64 + t] = back;
  ptx::fence_proxy_async();
  __syncthreads();
  if (t == 0) {
    ptx::bulk_store(out + row, ptx::smem_u32(s + 64), bytes);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// Rank r's thread 0 collects one arrival of every block of the cluster, then all read. out [blocks]
__global__ void arrivals_kernel(int* out) {
  STATIC_SMEM(uint64_t, bar, 1);
  STATIC_SMEM(unsigned, value, 1);
  const uint32_t full = ptx::smem_u32(bar), rank = ptx::cluster_rank(), size = ptx::cluster_size();
  if (threadIdx.x == 0) {
    value[0] = 0;
    ptx::mbar_init(full, size);
    ptx::mbar_fence_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x < size) {
    if (rank == 1) {
      ptx::st_cluster(ptx::mapa(ptx::smem_u32(value), threadIdx.x), 100 + threadIdx.x);
      ptx::mbar_arrive_cluster(full, threadIdx.x);
    } else {  // nothing written, so nothing to order
      ptx::mbar_free_cluster(full, threadIdx.x);
    }
  }
  ptx::mbar_wait(full, 0);
  if (threadIdx.x == 0) out[blockIdx.x] = int(value[0] * 10 + rank);
  ptx::cluster_sync();
}

CUtensorMap map_of(const simt_test::Arguments& a, int rank, int first) {
  // numbers from `first`: sizes, strides in elements (rank - 1), box, swizzle
  uint64_t size[4], stride[3];
  uint32_t box[4];
  const int64_t* n = a.numbers + first;
  for (int i = 0; i < rank; ++i) size[i] = uint64_t(n[i]), box[i] = uint32_t(n[2 * rank - 1 + i]);
  for (int i = 0; i + 1 < rank; ++i) stride[i] = uint64_t(n[rank + i]);
  const auto swizzle = CUtensorMapSwizzle(n[3 * rank - 1]);
  const auto of = [&](auto r) {
    constexpr int R = decltype(r)::value;
    uint64_t sz[R], st[R - 1];
    uint32_t bx[R];
    for (int i = 0; i < R; ++i) sz[i] = size[i], bx[i] = box[i];
    for (int i = 0; i + 1 < R; ++i) st[i] = stride[i];
    return tensor_map<R>(a.at<void>(0), DType::f16, sz, st, bx, swizzle);
  };
  if (rank == 2) return of(std::integral_constant<int, 2>());
  if (rank == 3) return of(std::integral_constant<int, 3>());
  return of(std::integral_constant<int, 4>());
}

template <int N, class E>
void launch_wgmma(const simt_test::Arguments& a) {
  // numbers: N, bf16, a_bytes, b_bytes, a_mn, b_mn, the four strides, the two swizzles, accumulate, A in registers
  const bool a_mn = a.number(4), b_mn = a.number(5);
  constexpr int A_MN = N == 64;  // the widest variety at the narrowest width: it compiles in seconds
  const auto kernel = a_mn ? (b_mn ? wgmma_kernel<N, E, A_MN, 1> : wgmma_kernel<N, E, A_MN, 0>)
                           : (b_mn ? wgmma_kernel<N, E, 0, 1> : wgmma_kernel<N, E, 0, 0>);
  const int bytes = (a.number(2) + 1023) / 1024 * 1024 + a.number(3);
  allow_shared(kernel, size_t(bytes));
  LAUNCH(kernel, 1, 128, bytes, Stream(), a.at<uint16_t>(0), a.at<uint16_t>(1),
         a.number(13) ? a.at<uint32_t>(2) : nullptr, a.at<float>(3), a.number(2), a.number(3),
         make_int4(a.number(6), a.number(7), a.number(8), a.number(9)), make_int2(a.number(10), a.number(11)),
         a.number(12));
}

}  // namespace

// buffers: tensor, out; numbers: rank, store, bytes, four coordinates, blocks of the cluster, mask, then the map's
TEST_KERNEL(tensor_tile) {
  const int rank = a.number(0), store = a.number(1), bytes = a.number(2), blocks = a.number(7);
  const CUtensorMap map = map_of(a, rank, 9);
  const int4 at = make_int4(a.number(3), a.number(4), a.number(5), a.number(6));
  const auto loads = rank == 2 ? tile_kernel<2, false> : rank == 3 ? tile_kernel<3, false> : tile_kernel<4, false>;
  const auto stores = rank == 2 ? tile_kernel<2, true> : rank == 3 ? tile_kernel<3, true> : tile_kernel<4, true>;
  LAUNCH_CLUSTER(store ? stores : loads, blocks, 64, blocks, bytes, Stream(), map, a.at<uint16_t>(1), bytes, at,
                 a.number(8));
}
TEST_KERNEL(wgmma) {
  const int n = a.number(0);
  if (a.number(1)) {
    if (n == 64) return launch_wgmma<64, __nv_bfloat16>(a);
    if (n == 96) return launch_wgmma<96, __nv_bfloat16>(a);
    if (n == 128) return launch_wgmma<128, __nv_bfloat16>(a);
    if (n == 192) return launch_wgmma<192, __nv_bfloat16>(a);
    return launch_wgmma<256, __nv_bfloat16>(a);
  }
  if (n == 64) return launch_wgmma<64, __half>(a);
  if (n == 96) return launch_wgmma<96, __half>(a);
  if (n == 128) return launch_wgmma<128, __half>(a);
  if (n == 192) return launch_wgmma<192, __half>(a);
  return launch_wgmma<256, __half>(a);
}
TEST_KERNEL(phases) {
  LAUNCH(phases_kernel, 1, 64, 0, Stream(), a.at<int>(0), a.number(0));
}
TEST_KERNEL(ring) {
  const int fault = a.number(2);
  const auto kernel = fault == 1   ? ring_kernel<1>
                      : fault == 2 ? ring_kernel<2>
                      : fault == 3 ? ring_kernel<3>
                                   : ring_kernel<0>;
  LAUNCH_CLUSTER(kernel, a.number(0), 64, a.number(1), 4 * 64 * sizeof(float), Stream(), a.at<float>(0),
                 a.at<float>(1));
}
TEST_KERNEL(arrivals) {
  LAUNCH_CLUSTER(arrivals_kernel, a.number(0), 32, a.number(1), 0, Stream(), a.at<int>(0));
}

}  // namespace cuda
}  // namespace igpt
