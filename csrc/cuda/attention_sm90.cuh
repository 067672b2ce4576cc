// What Hopper's attention kernels share: tiles of 64 rows that TMA brings and wgmma reads, a ring of stages with notes
// of who meets what, and the products of a warpgroup that owns 64 rows.
#pragma once
#include "attention.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace igpt {
namespace cuda {
namespace attention {

// ---- tiles: 64 rows of a head, as panels side by side, as wide as a swizzle that divides D ----

template <int D>
struct Panels {
  static constexpr int kWidth = D % 64 ? 32 : 64, kSpan = 2 * kWidth;  // in elements, in bytes
  static constexpr int kBytes = kTile * kSpan, kTileBytes = kTile * D * 2;
  static constexpr ptx::Swizzle kSwizzle = D % 64 ? ptx::Swizzle::b64 : ptx::Swizzle::b128;
};

template <int D>
CUtensorMap map_of(const View& x) {
  const auto stride = [&](int i) { return uint64_t(x.size[i] == 1 ? D : x.stride[i]); };
  const uint64_t size[4] = {D, uint64_t(x.size[2]), uint64_t(x.size[1]), uint64_t(x.size[0])};
  const uint64_t strides[3] = {stride(2), stride(1), stride(0)};
  const uint32_t box[4] = {Panels<D>::kWidth, kTile, 1, 1};
  return tensor_map<4>(x.data, x.dtype, size, strides, box,
                       D % 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
}

// Asks for rows t.. of a head; zeros behind the end.
template <int D>
__device__ inline void bring_tile(uint32_t to, const CUtensorMap* map, uint32_t bar, int t, int head, int image) {
#pragma unroll
  for (int d = 0; d < D; d += Panels<D>::kWidth)
    ptx::tma_load(to + d / Panels<D>::kWidth * Panels<D>::kBytes, map, bar, d, t, head, image);
}

// ---- the ring: own tiles of a block, then stages; their mbarriers; notes ----

// kMath threads compute, in warpgroups of 64 rows that keep kOwn bytes each; a warpgroup beside them brings kStages
// stages of kStage bytes. kMathRegisters and kBringRegisters are what setmaxnreg gives them: together no more than the
// block was launched with, or it would wait for ever.
template <int groups, int own, int stages, int stage, int blocks, int math_registers, int bring_registers>
struct Layout {
  static constexpr int kGroups = groups, kOwn = own, kStages = stages, kStage = stage, kBlocks = blocks;
  static constexpr int kMath = 128 * groups, kThreads = kMath + 128;
  static constexpr int kMathRegisters = math_registers, kBringRegisters = bring_registers;
  static constexpr int kShared = groups * own + stages * stage;
  static constexpr int kLaunched = 65536 / (kThreads * blocks) / 8 * 8;
  static_assert(groups * math_registers + bring_registers <= (groups + 1) * kLaunched);
  static_assert(own % 1024 == 0 && stage % 1024 == 0, "swizzles repeat after 1024 bytes");
};

constexpr int kNoMore = -1;  // the index of a note that ends the walk
constexpr uint32_t kNone = ~0u;

template <class L>
struct Ring {
  uint32_t shared, bars;
  const Meeting<L::kGroups>* notes;  // of the stages
  __device__ uint32_t own(int group) const { return shared + group * L::kOwn; }
  __device__ uint32_t stage(uint32_t step) const {
    return shared + L::kGroups * L::kOwn + step % L::kStages * L::kStage;
  }
  __device__ uint32_t own_full() const { return bars; }
  __device__ uint32_t full(uint32_t step) const { return bars + 8 + step % L::kStages * 16; }
  __device__ uint32_t empty(uint32_t step) const { return full(step) + 8; }
  __device__ static uint32_t phase(uint32_t step) { return step / L::kStages % 2; }

  // By all threads of the block.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      ptx::mbar_init(own_full(), 1);
      for (int i = 0; i < L::kStages; ++i) {
        ptx::mbar_init(full(i), 1);
        ptx::mbar_init(empty(i), L::kMath / 32);  // every warp that reads it
      }
      ptx::mbar_fence_init();
    }
    __syncthreads();
  }
  // A lane for its warp, when all of it has read the stage.
  __device__ void release(uint32_t step) const {
    if (threadIdx.x % 32 == 0) ptx::mbar_arrive(empty(step));
  }
};
#define ATTENTION_RING(L, ring)                             \
  DYN_SMEM_1024(unsigned char, ring_shared);                \
  STATIC_SMEM(uint64_t, ring_bars, 1 + 2 * L::kStages);     \
  STATIC_SMEM(Meeting<L::kGroups>, ring_notes, L::kStages); \
  const Ring<L> ring = {ptx::smem_u32(ring_shared), ptx::smem_u32(ring_bars), ring_notes}

// By one thread: walks over the tiles that any of the warpgroups meets, load(stage's address, mbarrier, tile's index)
// asking for kStage bytes of each; a note without bytes ends the walk.
template <class L, class Load>
__device__ inline void bring(const Ring<L>& ring, Meeting<L::kGroups>* notes, Line (&lines)[L::kGroups],
                             const int* tile, const int* mask, Load load) {
  for (uint32_t step = 0;; ++step) {
    Meeting<L::kGroups> met;
    const bool more = next(met, lines, tile, mask);
    if (!more) met.index = kNoMore;
    ptx::mbar_wait(ring.empty(step), ring.phase(step) ^ 1u);
    notes[step % L::kStages] = met;
    if (!more) return ptx::mbar_arrive(ring.full(step));
    ptx::mbar_arrive_expect_tx(ring.full(step), L::kStage);
    load(ring.stage(step), ring.full(step), met.index);
  }
}

// A warpgroup's place in the walk.
struct Place {
  uint32_t step = 0;
  int index, id;  // of the tile, of its mask
};
// From place.step on, the first stage that this warpgroup meets; false when there is none.
template <class L>
__device__ inline bool find(Place& place, const Ring<L>& ring, int group) {
  for (;; ++place.step) {
    ptx::mbar_wait(ring.full(place.step), ring.phase(place.step));
    const Meeting<L::kGroups>& note = ring.notes[place.step % L::kStages];
    place.index = __shfl_sync(0xffffffffu, note.index, 0);  // the compiler shall know that a warp agrees
    place.id = __shfl_sync(0xffffffffu, note.id[group], 0);
    if (place.index == kNoMore) return false;
    if (place.id != -2) return true;
    ring.release(place.step);
  }
}

// ---- products of a warpgroup: 64 x 64 scores, and 64 x D sums ----

// Register j belongs to row 8 of_row(j) of the thread's first, and column 8 (j / 4) + 2 (lane % 4) + j % 2.
using Scores64 = float[kTile / 2];
template <int D>
using Sums64 = float[D / 2];
using Packed = uint32_t[kTile / 16][4];  // scores as the left operand of wgmma
__device__ constexpr int of_row(int j) {
  return j / 2 % 2;
}
// The thread's first row within its warpgroup's tile.
__device__ inline int first_row() {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

// s = a b^T of two tiles.
template <int D, class T>
__device__ inline void start_scores(Scores64& s, uint32_t a, uint32_t b) {
  using P = Panels<D>;
  const uint64_t x = ptx::matrix_descriptor(a, 16, 8 * P::kSpan, P::kSwizzle);
  const uint64_t y = ptx::matrix_descriptor(b, 16, 8 * P::kSpan, P::kSwizzle);
  ptx::wgmma_fence();
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    const int at = (d / P::kWidth * P::kBytes + d % P::kWidth * 2) / 16;  // descriptors count in 16 bytes
    ptx::wgmma<kTile, T>(s, x + at, y + at, d > 0);
  }
  ptx::wgmma_commit();
}

template <class T>
__device__ inline void pack(Packed& p, const Scores64& s) {
#pragma unroll
  for (int j = 0; j < kTile / 2; j += 2) p[j / 8][j / 2 % 4] = ptx::pack2<T>(s[j], s[j + 1]);
}

// o += p b.
template <int D, class T>
__device__ inline void start_mix(Sums64<D>& o, const Packed& p, uint32_t b) {
  using P = Panels<D>;
  const uint64_t y = ptx::matrix_descriptor(b, P::kBytes, 8 * P::kSpan, P::kSwizzle);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kTile / 16; ++i) ptx::wgmma<D, T, 1>(o, p[i], y + i * P::kSpan, 1);
  ptx::wgmma_commit();
}

// -inf where bits(0 or 1, the thread's row) does not have a column's bit.
template <class Bits>
__device__ inline void hide(Scores64& s, Bits bits) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint64_t seen = bits(r) >> (threadIdx.x % 4 * 2);
#pragma unroll
    for (int j = 0; j < kTile / 2; ++j)
      if (of_row(j) == r && !(seen >> (j / 4 * 8 + j % 2) & 1)) s[j] = -INFINITY;
  }
}

// The thread's two rows, times factor[r], leave through the registers: pairs of four lanes are 16 bytes side by side.
template <int D, class T>
__device__ inline void store_rows(const Head<T>& out, int64_t first, int64_t end, const Sums64<D>& sums,
                                  const float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (first + 8 * r >= end) continue;
    T* to = out.row(first + 8 * r) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      *reinterpret_cast<uint32_t*>(to + 8 * d) =
          ptx::pack2<T>(sums[4 * d + 2 * r] * factor[r], sums[4 * d + 2 * r + 1] * factor[r]);
  }
}

}  // namespace attention
}  // namespace cuda
}  // namespace igpt
