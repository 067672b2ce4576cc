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

// The same rows of two tensors, one tile behind the other.
template <int D>
__device__ inline void bring_two(uint32_t to, const CUtensorMap* a, const CUtensorMap* b, uint32_t bar, int tile,
                                 int head, int image) {
  bring_tile<D>(to, a, bar, tile * kTile, head, image);
  bring_tile<D>(to + Panels<D>::kTileBytes, b, bar, tile * kTile, head, image);
}

// ---- a block's work: the rows of one place in a head, or of two ----

// kMath threads compute, in warpgroups of 64 rows that keep kOwn bytes each for every one of kItems places; a warpgroup
// beside them brings kStages stages of kStage bytes. kMathRegisters and kBringRegisters are what setmaxnreg gives them:
// together no more than the block was launched with, or it would wait for ever. kBlocks run on a multiprocessor.
template <int groups, int own, int items, int stages, int stage, int blocks, int math_registers, int bring_registers>
struct Layout {
  static constexpr int kGroups = groups, kOwn = own, kItems = items, kStages = stages, kStage = stage, kBlocks = blocks;
  static constexpr int kMath = 128 * groups, kThreads = kMath + 128;
  static constexpr int kMathRegisters = math_registers, kBringRegisters = bring_registers;
  static constexpr int kShared = items * groups * own + stages * stage;
  static constexpr int kLaunched = 65536 / (kThreads * blocks) / 8 * 8;
  static_assert(groups * math_registers + bring_registers <= (groups + 1) * kLaunched);
  static_assert(own % 1024 == 0 && stage % 1024 == 0, "swizzles repeat after 1024 bytes");
  static_assert(blocks * (kShared + 2048) <= 228 * 1024);
};

// Places of a head, 64 rows a warpgroup, and how many a block takes: one, or where there is work for many a long one
// and the short one from the other end, so that blocks end together and the second begins while the first one ends.
struct Work {
  int places, items;
  template <class L>
  static Work of(int64_t heads, int64_t rows) {
    const int places = int((rows + L::kGroups * kTile - 1) / (L::kGroups * kTile));
    const int64_t slots = int64_t(device_attribute(cudaDevAttrMultiProcessorCount)) * L::kBlocks;
    return {places, L::kItems == 2 && heads * places >= 4 * slots ? 2 : 1};
  }
  __host__ __device__ int blocks() const { return (places + items - 1) / items; }  // of a head
  __device__ int head() const { return int(blockIdx.x) / blocks(); }
  // How many of its items this block has.
  __device__ int count() const { return items == 2 && 2 * (int(blockIdx.x) % blocks()) + 1 < places ? 2 : 1; }
  // The place of item n; from the last one on where those are the long ones.
  __device__ int place(int n, bool last_first) const {
    const int at = int(blockIdx.x) % blocks();
    return (n == 1) != last_first ? places - 1 - at : at;
  }
};

// ---- the ring: own tiles of a block, then stages; their mbarriers; notes ----

// Where one is in the ring: stages follow one another, and after the last of them the phase of their mbarriers changes.
template <class L>
struct Place {
  uint32_t stage = 0, phase = 0;
  __device__ void advance() {
    if (++stage == L::kStages) stage = 0, phase ^= 1;
  }
};

template <class L>
struct Ring {
  static constexpr int kWordsOfStage = 2 + L::kGroups, kWords = L::kItems + L::kStages * kWordsOfStage;
  static constexpr int kOwnBytes = L::kItems * L::kGroups * L::kOwn;
  uint32_t shared;
  uint64_t* words;  // mbarriers of the items' own tiles, then of each stage: mbarriers full and empty, notes
  __device__ uint32_t own(int item, int group) const { return shared + (item * L::kGroups + group) * L::kOwn; }
  __device__ uint32_t stage(uint32_t i) const { return shared + kOwnBytes + i * L::kStage; }
  __device__ uint32_t own_full(int item) const { return ptx::smem_u32(words) + item * 8; }
  __device__ uint32_t full(uint32_t i) const { return own_full(L::kItems) + i * kWordsOfStage * 8; }
  __device__ uint32_t empty(uint32_t i) const { return full(i) + 8; }
  // Of warpgroup g: the tile's index, and its mask's number in the upper half.
  __device__ uint64_t& note(uint32_t i, int g) const { return words[L::kItems + i * kWordsOfStage + 2 + g]; }

  // By all threads of the block.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < L::kItems; ++i) ptx::mbar_init(own_full(i), 1);
      for (int i = 0; i < L::kStages; ++i) {
        ptx::mbar_init(full(i), 1);
        ptx::mbar_init(empty(i), L::kMath / 32);  // every warp that reads it
      }
      ptx::mbar_fence_init();
    }
    __syncthreads();
  }
  // A lane for its warp, when all of it has read the stage.
  __device__ void release(uint32_t i) const {
    if (threadIdx.x % 32 == 0) ptx::mbar_arrive(empty(i));
  }
};
#define ATTENTION_RING(L, ring)                       \
  DYN_SMEM_1024(unsigned char, ring_shared);          \
  STATIC_SMEM(uint64_t, ring_words, Ring<L>::kWords); \
  const Ring<L> ring = {ptx::smem_u32(ring_shared), ring_words}

constexpr int kNoMore = -1;  // the index of a note that ends an item

// By one thread: walks over the tiles that any of the warpgroups meets, load(stage's address, mbarrier, tile's index)
// asking for kStage bytes of each; a note without bytes ends the walk.
template <class L, class Load>
__device__ inline void bring(Place<L>& at, const Ring<L>& ring, Line (&lines)[L::kGroups], const int* tile,
                             const int* mask, Load load) {
  for (bool more = true; more; at.advance()) {
    Meeting<L::kGroups> met;
    more = next(met, lines, tile, mask);
    ptx::mbar_wait(ring.empty(at.stage), at.phase ^ 1u);
#pragma unroll
    for (int g = 0; g < L::kGroups; ++g)
      ring.note(at.stage, g) = more ? uint64_t(uint32_t(met.id[g])) << 32 | uint32_t(met.index) : uint32_t(kNoMore);
    if (more) {
      ptx::mbar_arrive_expect_tx(ring.full(at.stage), L::kStage);
      load(ring.stage(at.stage), ring.full(at.stage), met.index);
    } else {
      ptx::mbar_arrive(ring.full(at.stage));
    }
  }
}

// All of the bringing warpgroup's work, which one thread does. Of each of the block's `count` items: the warpgroups'
// own tiles by own(address, mbarrier, tile's index), kOwn bytes each, then by load(...) what any of them meets, which
// line(tile's index) begins to tell.
template <class L, class First, class LineOf, class Own, class Load>
__device__ inline void bring_items(const Ring<L>& ring, int count, First first_tile, LineOf line, const int* tile,
                                   const int* mask, Own own, Load load) {
  ptx::reg_dealloc<L::kBringRegisters>();
  if (threadIdx.x > L::kMath) return;
  Place<L> at;
  for (int n = 0; n < count; ++n) {
    Line lines[L::kGroups];
    ptx::mbar_arrive_expect_tx(ring.own_full(n), L::kGroups * L::kOwn);
#pragma unroll
    for (int g = 0; g < L::kGroups; ++g) {
      lines[g] = line(first_tile(n) + g);
      own(ring.own(n, g), ring.own_full(n), first_tile(n) + g);
    }
    bring(at, ring, lines, tile, mask, load);
  }
}

// A warpgroup's tile: where it lies, its index, its mask's number.
template <class L>
struct Met : Place<L> {
  int index, id;
};
// From here on, the first stage that this warpgroup meets; false at the item's end, and the next item's first stage.
// Before it passes one by it calls idle(), which must release what is held: the stages to come may want its place.
template <class L, class Idle>
__device__ inline bool find(Met<L>& tile, const Ring<L>& ring, int group, Idle idle) {
  for (;; tile.advance()) {
    ptx::mbar_wait(ring.full(tile.stage), tile.phase);
    const uint64_t note = ring.note(tile.stage, group);
    tile.index = int(uint32_t(note)), tile.id = int(note >> 32);
    if (tile.index != kNoMore && tile.id != -2) return true;
    idle();
    __syncwarp();
    ring.release(tile.stage);
    if (tile.index == kNoMore) return tile.advance(), false;
  }
}

// Waits for the products in flight, into `sums`, and releases the stage `held` that they read; none is held then.
template <class L, class... Sums>
__device__ inline void finish_products(const Ring<L>& ring, int& held, Sums&... sums) {
  ptx::wgmma_wait<0>();
  (ptx::hold_registers(sums), ...);
  if (held >= 0) ring.release(held);
  held = -1;
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

// The descriptor of what lies `bytes` behind another, in the half of the word that holds the address: a sum of 64 bits
// would take three times the instructions.
__device__ inline uint64_t behind(uint64_t descriptor, int bytes) {
  return (descriptor & ~uint64_t(0xffffffffu)) | uint32_t(uint32_t(descriptor) + bytes / 16);
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
    const int at = d / P::kWidth * P::kBytes + d % P::kWidth * 2;
    ptx::wgmma<kTile, T>(s, behind(x, at), behind(y, at), d > 0);
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
  for (int i = 0; i < kTile / 16; ++i) ptx::wgmma<D, T, 1>(o, p[i], behind(y, 16 * i * P::kSpan), 1);
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
