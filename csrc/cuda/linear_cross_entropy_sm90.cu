// linear_cross_entropy on Hopper: the formulas and the shapes of linear_cross_entropy.cu, for bf16 and f16.
//
// A block owns 128 rows and walks over tiles of 256 colours. One thread brings hidden and weight by TMA in steps of 64
// columns, four steps in flight; two warpgroups of 64 rows each multiply them by wgmma m64n256k16, 128 sums a thread.
// Two neighbouring blocks form a cluster: each brings one half of the weight's tile for both, so that a step of
// 2 x 128 x 256 x 64 flops takes 32 KB from L2, 128 flops a byte (64 with mma.sync). A stage is released by every warp
// that reads it, in both blocks, since the next copy into it lands in both.
//
// A warpgroup owns all 256 colours of its rows. So a thread has two rows, four lanes share them, and the softmax needs
// no shared memory. The warpgroups wait for copies, not for each other: one may be in its softmax while the other still
// multiplies, and the next tile is on its way. dlogits are turned in shared memory that a warp has for itself, 16 rows
// of 64 at a time, and leave in 16 bytes.
//
// A tile of C = 512 is 8,192 cycles of wgmma and 2,048 of exp2 at 16 a cycle. Bytes and flops in all: those of
// linear_cross_entropy.cu, whose launchers choose these kernels and check what both refuse.
//
// sass linear_cross_entropy_dlogits_sm90_kernel<bf16>: HGMMA = 4, LOCAL = 0
#include "../common/check.h"
#include "launch.h"
#include "linear_cross_entropy.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace igpt {
namespace cuda {
namespace {

constexpr int kRows = 128;             // of a block, 64 a warpgroup
constexpr int kColumns = 256;          // of a tile: the widest wgmma
constexpr int kHalf = kColumns / 2;    // of the weight's tile that one block of the cluster brings
constexpr int kDepth = 64;             // of a step: 128 bytes, the widest swizzle
constexpr int kStages = 4;             // 192 KB
constexpr int kMath = 256;             // two warpgroups
constexpr int kThreads = kMath + 128;  // and one whose first thread asks for the copies; its registers go to the others
constexpr int kPart = kRows * kDepth * 2;  // bytes of 128 rows: hidden, then the halves of weight
constexpr int kStage = 3 * kPart;
constexpr int kTurn = 16 * 128;  // bytes in which a warp turns 16 rows of 64 dlogits
constexpr int kShared = kStages * kStage;
constexpr int kMathRegisters = 232, kBringRegisters = 40;  // of three warpgroups launched with 168
static_assert(2 * kMathRegisters + kBringRegisters <= 3 * 168, "setmaxnreg would wait for ever");
static_assert(kRows == kHalf, "hidden and a half of weight are boxes of one size");

// The block's row of stages and the mbarriers that say which are full and which are empty.
struct Ring {
  uint32_t stages, full, empty;
  __device__ uint32_t stage(uint32_t step) const { return stages + step % kStages * kStage; }
  __device__ uint32_t full_of(uint32_t step) const { return full + step % kStages * 8; }
  __device__ uint32_t empty_of(uint32_t step) const { return empty + step % kStages * 8; }
  __device__ static uint32_t phase(uint32_t step) { return step / kStages % 2; }
};

__device__ inline Ring make_ring(const unsigned char* shared, const uint64_t* bars) {
  const Ring ring{ptx::smem_u32(shared), ptx::smem_u32(bars), ptx::smem_u32(bars + kStages)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbar_init(ring.full_of(i), 1);
      ptx::mbar_init(ring.empty_of(i), 2 * kMath / 32);  // every warp that reads it, of both blocks
    }
    ptx::mbar_fence_init();
  }
  ptx::cluster_sync();
  return ring;
}

// ---- copies ----

__device__ inline void bring(const Ring& ring, const CUtensorMap* hidden, const CUtensorMap* weight, int row, int V,
                             int C) {
  const int rank = int(ptx::cluster_rank());
  uint32_t step = 0;
  for (int col = 0; col < V; col += kColumns)
    for (int k = 0; k < C; k += kDepth, ++step) {
      const uint32_t to = ring.stage(step), bar = ring.full_of(step);
      ptx::mbar_wait(ring.empty_of(step), ring.phase(step) ^ 1u);
      ptx::mbar_arrive_expect_tx(bar, kStage);
      ptx::tma_load(to, hidden, bar, k, row);
      ptx::tma_load_multicast(to + (1 + rank) * kPart, weight, bar, uint16_t(3), k, col + rank * kHalf);
    }
}

// ---- logits of a tile ----

// A thread's sums; i of 2 rows, 8 apart, j of 64 columns.
using Sums = float[kColumns / 2];
__device__ inline float& at(Sums& sums, int i, int j) {
  return sums[j / 2 * 4 + i * 2 + j % 2];
}
__device__ inline int column_of(int j) {
  return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
}

// Calls finish(first colour, logits) for each tile of 256 colours; logits beyond V are -inf.
template <class T, class F>
__device__ inline void each_tile(const Ring& ring, int V, int C, F finish) {
  const uint32_t rows = threadIdx.x / 128 * (kPart / 2);  // of this warpgroup in hidden
  const uint32_t lane = threadIdx.x % 32;
  uint32_t step = 0;
  for (int col = 0; col < V; col += kColumns) {
    Sums sums;
    for (int k = 0; k < C; k += kDepth, ++step) {
      const uint32_t from = ring.stage(step);
      ptx::mbar_wait(ring.full_of(step), ring.phase(step));
      const uint64_t a = ptx::matrix_descriptor(from + rows, 16, 1024, ptx::Swizzle::b128);
      const uint64_t b = ptx::matrix_descriptor(from + kPart, 16, 1024, ptx::Swizzle::b128);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i)  // sixteen columns are 32 bytes: two units of the descriptor's address
        ptx::wgmma<kColumns, T>(sums, a + 2 * i, b + 2 * i, k > 0 || i > 0);
      ptx::wgmma_commit();
      if (k > 0) {
        ptx::wgmma_wait<1>();
        if (lane < 2) ptx::mbar_free_cluster(ring.empty_of(step - 1), lane);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::hold_registers(sums);
    if (lane < 2) ptx::mbar_free_cluster(ring.empty_of(step - 1), lane);
    if (col + kColumns > V) {
#pragma unroll
      for (int j = 0; j < kColumns / 4; ++j)
        if (col + column_of(j) >= V) at(sums, 0, j) = at(sums, 1, j) = -INFINITY;
    }
    finish(col, sums);
  }
}

// The first of a thread's two rows within the block; the second is 8 below.
__device__ inline int row_of_thread() {
  return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
}

// The target of row n, -1 for one out of range.
__device__ inline int target_of(const int64_t* targets, int64_t n, int64_t N, int V) {
  const int64_t t = n < N ? targets[n] : -1;
  return t >= 0 && t < V ? int(t) : -1;
}

// ---- kernels ----

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    linear_cross_entropy_fwd_sm90_kernel(const __grid_constant__ CUtensorMap hidden,  // [N, C]
                                         const __grid_constant__ CUtensorMap weight,  // [V, C]
                                         float* loss,                                 // [N]
                                         float* lse,                                  // [N]
                                         const int64_t* targets,                      // [N]
                                         int64_t N, int V, int C) {
  DYN_SMEM_1024(unsigned char, shared);
  STATIC_SMEM(uint64_t, bars, 2 * kStages);
  const Ring ring = make_ring(shared, bars);
  const int64_t first_row = int64_t(blockIdx.x) * kRows;

  if (threadIdx.x >= kMath) {
    ptx::reg_dealloc<kBringRegisters>();
    if (threadIdx.x == kMath) bring(ring, &hidden, &weight, int(first_row), V, C);
  } else {
    ptx::reg_alloc<kMathRegisters>();
    const int64_t n = first_row + row_of_thread();
    const int target[2] = {target_of(targets, n, N, V), target_of(targets, n + 8, N, V)};
    Softmax rows[2];
    float chosen[2] = {};  // the logit of the target, in one lane of four
    each_tile<T>(ring, V, C, [&](int col, Sums& logits) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float higher = rows[i].top;
#pragma unroll
        for (int j = 0; j < kColumns / 4; ++j) higher = fmaxf(higher, at(logits, i, j));
        rows[i].raise(higher);
#pragma unroll
        for (int j = 0; j < kColumns / 4; ++j) {
          const float x = at(logits, i, j);
          rows[i].add(x);
          if (column_of(j) == target[i] - col) chosen[i] = x;
        }
      }
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows[i].join_four();
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) chosen[i] += __shfl_xor_sync(0xffffffffu, chosen[i], offset);
      if (threadIdx.x % 4 == 0 && n + 8 * i < N) {
        const float l = rows[i].lse();
        lse[n + 8 * i] = l;
        loss[n + 8 * i] = target[i] >= 0 ? l - chosen[i] : NAN;
      }
    }
  }
  __syncwarp();
  ptx::cluster_sync();  // the other block may still tell this one's mbarriers
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    linear_cross_entropy_dlogits_sm90_kernel(const __grid_constant__ CUtensorMap hidden,  // [N, C]
                                             const __grid_constant__ CUtensorMap weight,  // [V, C]
                                             T* dlogits,                                  // [N, width]
                                             const float* dloss,                          // [N]
                                             const int64_t* targets,                      // [N]
                                             const float* lse,                            // [N]
                                             int64_t N, int V, int C, int width) {
  DYN_SMEM_1024(unsigned char, shared);
  STATIC_SMEM(uint64_t, bars, 2 * kStages);
  const Ring ring = make_ring(shared, bars);
  const int64_t first_row = int64_t(blockIdx.x) * kRows;

  if (threadIdx.x >= kMath) {
    ptx::reg_dealloc<kBringRegisters>();
    if (threadIdx.x == kMath) bring(ring, &hidden, &weight, int(first_row), V, C);
  } else {
    ptx::reg_alloc<kMathRegisters>();
    const int lane = threadIdx.x % 32;
    const int64_t warp_row = first_row + threadIdx.x / 32 * 16, n = first_row + row_of_thread();
    unsigned char* turn = shared + kShared + threadIdx.x / 32 * kTurn;
    int target[2];
    float g[2], l[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      target[i] = target_of(targets, n + 8 * i, N, V);
      g[i] = target[i] >= 0 ? dloss[n + 8 * i] : NAN;
      l[i] = n + 8 * i < N ? lse[n + 8 * i] : 0.f;
    }
    each_tile<T>(ring, V, C, [&](int col, Sums& logits) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {  // 64 columns: eight chunks of 16 bytes a row, eight rows in eight banks
        __syncwarp();                         // the part before has left
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 16 * part; j < 16 * part + 16; j += 2) {
            const int r = lane / 4 + 8 * i, chunk = j / 2 % 8 ^ lane / 4;
            const float d0 = dlogit(at(logits, i, j), l[i], g[i], column_of(j) == target[i] - col);
            const float d1 = dlogit(at(logits, i, j + 1), l[i], g[i], column_of(j + 1) == target[i] - col);
            *reinterpret_cast<uint32_t*>(turn + r * 128 + chunk * 16 + lane % 4 * 4) = ptx::pack2<T>(d0, d1);
          }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = lane / 8 + 4 * i, chunk = lane % 8, c = col + 64 * part + 8 * chunk;
          const uint4 eight = *reinterpret_cast<const uint4*>(turn + r * 128 + (chunk ^ r % 8) * 16);
          if (warp_row + r < N && c < width) *reinterpret_cast<uint4*>(dlogits + (warp_row + r) * width + c) = eight;
        }
      }
    });
  }
  __syncwarp();
  ptx::cluster_sync();
}

// ---- launchers ----

CUtensorMap map_of(const View& rows) {
  const uint64_t size[2] = {uint64_t(rows.cols()), uint64_t(rows.size[0])};
  const uint64_t stride[1] = {uint64_t(rows.size[0] == 1 ? rows.cols() : rows.stride[0])};
  const uint32_t box[2] = {kDepth, kRows};
  return tensor_map<2>(rows.data, rows.dtype, size, stride, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

unsigned blocks_of(int64_t rows) {
  IGPT_CHECK(rows <= INT32_MAX - 2 * kRows, "linear_cross_entropy: more than 2^31 rows");
  return unsigned((rows + 2 * kRows - 1) / (2 * kRows) * 2);  // whole clusters
}

template <class F>
void by_sixteen(DType dtype, F f) {
  if (dtype == DType::bf16) return f.template operator()<__nv_bfloat16>();
  f.template operator()<__half>();
}

}  // namespace

void linear_cross_entropy_fwd_sm90(View loss, View lse, View hidden, View weight, View targets, Stream stream) {
  by_sixteen(hidden.dtype, [&]<class T>() {
    allow_shared(linear_cross_entropy_fwd_sm90_kernel<T>, kShared);
    LAUNCH_CLUSTER(linear_cross_entropy_fwd_sm90_kernel<T>, blocks_of(hidden.size[0]), kThreads, 2, kShared, stream,
                   map_of(hidden), map_of(weight), loss.as<float>(), lse.as<float>(), targets.as<int64_t>(),
                   hidden.size[0], int(weight.size[0]), int(hidden.cols()));
  });
}

void linear_cross_entropy_dlogits_sm90(View dlogits, View dloss, View hidden, View weight, View targets, View lse,
                                       Stream stream) {
  by_sixteen(hidden.dtype, [&]<class T>() {
    constexpr int shared = kShared + kMath / 32 * kTurn;
    allow_shared(linear_cross_entropy_dlogits_sm90_kernel<T>, shared);
    LAUNCH_CLUSTER(linear_cross_entropy_dlogits_sm90_kernel<T>, blocks_of(hidden.size[0]), kThreads, 2, shared, stream,
                   map_of(hidden), map_of(weight), dlogits.as<T>(), dloss.as<float>(), targets.as<int64_t>(),
                   lse.as<float>(), hidden.size[0], int(weight.size[0]), int(hidden.cols()), int(dlogits.cols()));
  });
}

}  // namespace cuda
}  // namespace igpt
