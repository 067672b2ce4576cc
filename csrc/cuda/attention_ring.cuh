// How Hopper's attention kernels share out their work: items of a block, the ring of stages that one thread fills with
// what they meet, and the notes that tell each warpgroup how much of it is its own.
#pragma once
#include <algorithm>

#include "attention.cuh"
#include "ptx_sm90.cuh"

namespace igpt {
namespace cuda {
namespace attention {

// ---- a block's work: rows of one place in a head after those of another ----

// kMath threads compute, in warpgroups of kLines lines each: tiles of 64 rows, for which kOwn bytes stay while others
// come; kItems places have room for these at a time. A warpgroup beside them brings kStages stages of kStage bytes.
// kMathRegisters and kBringRegisters are what setmaxnreg gives them: together no more than the block was launched with,
// or it would wait for ever. kBlocks run on a multiprocessor.
template <int groups, int lines, int own, int items, int stages, int stage, int blocks, int math_registers,
          int bring_registers>
struct Layout {
  static constexpr int kGroups = groups, kLines = lines, kAll = groups * lines, kOwn = own, kItems = items;
  static constexpr int kStages = stages, kStage = stage, kBlocks = blocks;
  static constexpr int kMath = 128 * groups, kThreads = kMath + 128;
  static constexpr int kMathRegisters = math_registers, kBringRegisters = bring_registers;
  static constexpr int kShared = items * kAll * own + stages * stage;
  static constexpr int kLaunched = 65536 / (kThreads * blocks) / 8 * 8;
  static_assert(groups * math_registers + bring_registers <= (groups + 1) * kLaunched);
  static_assert(own % 1024 == 0 && stage % 1024 == 0, "swizzles repeat after 1024 bytes");
  static_assert(blocks * (kShared + 2048) <= 228 * 1024);
};

// A place of a head: kAll tiles of rows. Of none, head is kNoMore.
struct alignas(8) Item {
  int head, place;
};
constexpr int kNoMore = -1;

// What the blocks of a call share out, as many blocks as run at a time: each takes portion after portion, and brings
// what the next one wants while this one ends. Where the L2 cache holds all that comes, a portion is a place: the
// longest places of all heads first, and every other round from the last block on, so that loads come out even. Else a
// head is read while it is there: a portion is a long place and the short one from the other end of the head.
struct Work {
  int heads, places, portions;  // places of a head; portions in all
  bool pairs, last_first;       // last_first: the last place is the longest, not the first
  // `bytes`: what a head's items bring.
  template <class L>
  static Work of(int64_t heads, int64_t rows, bool last_first, int64_t bytes) {
    const int64_t places = (rows + L::kAll * kTile - 1) / (L::kAll * kTile);
    const bool pairs = heads * bytes > int64_t(device_attribute(cudaDevAttrL2CacheSize)) / 3 * 2;
    return {int(heads), int(places), int(heads * (pairs ? (places + 1) / 2 : places)), pairs, last_first};
  }
  template <class L>
  static int64_t slots() {
    return int64_t(device_attribute(cudaDevAttrMultiProcessorCount)) * L::kBlocks;
  }
  template <class L>
  unsigned blocks() const {
    return unsigned(std::min<int64_t>(portions, slots<L>()));
  }

  // Calls f(item) for each of this block's.
  template <class F>
  __device__ void each(F f) const {
    if (pairs) {
      const int of_head = (places + 1) / 2;
      for (int portion = blockIdx.x; portion < portions; portion += gridDim.x) {
        const int head = portion / of_head, at = portion % of_head, other = places - 1 - at;
        f(Item{head, last_first ? other : at});
        if (at != other) f(Item{head, last_first ? at : other});
      }
      return;
    }
    bool back = false;
    for (int first = 0; first < portions; first += gridDim.x, back = !back) {
      const int portion = first + int(back ? gridDim.x - 1 - blockIdx.x : blockIdx.x), at = portion / heads;
      if (portion < portions) f(Item{portion % heads, last_first ? places - 1 - at : at});
    }
  }
};

// ---- the ring: own tiles of an item or two, then stages; their mbarriers; notes ----

// Where one is among N that follow one another; after the last of them the phase of their mbarriers changes. One
// register: there is none to spare.
template <int N>
class Place {
  uint32_t n_ = 0;  // below 2 N

 public:
  __device__ uint32_t at() const { return n_ < N ? n_ : n_ - N; }
  __device__ uint32_t phase() const { return n_ / N; }
  __device__ void advance() { n_ = n_ == 2 * N - 1 ? 0 : n_ + 1; }
};

// Of a stage: the tile's index, or kNoMore at an item's end, and its mask's number for each line.
template <class L>
struct alignas(8) Note {
  int index, id[L::kAll];
};

template <class L>
struct Ring {
  static constexpr int kWordsOfStage = 2 + sizeof(Note<L>) / 8, kWords = 3 * L::kItems + L::kStages * kWordsOfStage;
  static constexpr int kOwnBytes = L::kItems * L::kAll * L::kOwn;
  uint32_t shared;
  uint64_t* words;  // mbarriers full and empty of each item's own tiles, and what it is; of each stage, and its note
  // Of line l, which the warpgroups count through.
  __device__ uint32_t own(uint32_t item, int l) const { return shared + (item * L::kAll + l) * L::kOwn; }
  __device__ uint32_t stage(uint32_t i) const { return shared + kOwnBytes + i * L::kStage; }
  // By all of a warp, for which the compiler then knows it to be the same: wgmma's descriptors are made of it in
  // registers of the whole warp, not in each lane's and then fetched over.
  __device__ uint32_t stage_of_warp(uint32_t i) const { return __shfl_sync(0xffffffffu, stage(i), 0); }
  __device__ uint32_t own_full(uint32_t item) const { return ptx::smem_u32(words) + item * 24; }
  __device__ uint32_t full(uint32_t i) const { return own_full(L::kItems) + i * kWordsOfStage * 8; }
  __device__ static uint32_t empty_of(uint32_t full) { return full + 8; }
  // What an item is.
  __device__ Item& item(uint32_t i) const { return reinterpret_cast<Item&>(words[3 * i + 2]); }
  __device__ Note<L>& note(uint32_t i) const {
    return reinterpret_cast<Note<L>&>(words[3 * L::kItems + i * kWordsOfStage + 2]);
  }

  // By all threads of the block. maps: those that it will bring by, so that the first loads find them in the cache.
  template <class... Maps>
  __device__ void begin(const Maps&... maps) const {
    if (threadIdx.x == 0) {
      (ptx::tma_prefetch(&maps), ...);
      const auto both = [](uint32_t full) {
        ptx::mbar_init(full, 1);
        ptx::mbar_init(empty_of(full), L::kMath / 32);  // every warp that reads it
      };
      for (int i = 0; i < L::kItems; ++i) both(own_full(i));
      for (int i = 0; i < L::kStages; ++i) both(full(i));
      ptx::mbar_fence_init();
    }
    __syncthreads();
  }
  // A lane for its warp, when all of it has read what `full` announced.
  __device__ void release(uint32_t full) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbar_arrive(empty_of(full));
  }
};
#define ATTENTION_RING(L, ring)                       \
  DYN_SMEM_1024(unsigned char, ring_shared);          \
  STATIC_SMEM(uint64_t, ring_words, Ring<L>::kWords); \
  const Ring<L> ring = {ptx::smem_u32(ring_shared), ring_words}

// What a note says of a line and a tile, beside kWhole and kNotMet: no mask, but the order of the tokens or the end of
// the sequence hides some of it.
constexpr int kClipped = -3;

// By one thread: walks over the tiles that any of the lines meets, load(stage's address, mbarrier, tile's index) asking
// for kStage bytes of each; a note of kNoMore, without bytes, ends the walk. own() is called when `ahead` stages have
// been asked for, at the end where there are fewer.
template <class L, class Own, class Whole, class Load>
__device__ inline void bring(Place<L::kStages>& stage, const Ring<L>& ring, Line (&lines)[L::kAll], const int* tile,
                             const int* mask, int ahead, Own own, Whole whole, Load load) {
  for (bool more = true; more; stage.advance(), --ahead) {
    if (ahead == 0) own();
    Meeting<L::kAll> met;
    more = next(met, lines, tile, mask);
    const uint32_t full = ring.full(stage.at());
    ptx::mbar_wait(ring.empty_of(full), stage.phase() ^ 1u);
    Note<L>& note = ring.note(stage.at());
    note.index = more ? met.index : kNoMore;
#pragma unroll
    for (int l = 0; l < L::kAll; ++l)
      note.id[l] = !more ? kNotMet : met.id[l] == kWhole && !whole(l, met.index) ? kClipped : met.id[l];
    if (more) {
      ptx::mbar_arrive_expect_tx(full, L::kStage);
      load(ring.stage(stage.at()), full, met.index);
    } else {
      ptx::mbar_arrive(full);
    }
  }
  if (ahead >= 0) own();
}

// All of the bringing warpgroup's work, which one thread does. Of each of the block's items: the lines' own tiles by
// own(address, mbarrier, tile's index, head), kOwn bytes each, and by load(address, mbarrier, tile's index, head) what
// any of them meets, which line(own index) begins to tell; whole(own index, tile's index) is false where some is hidden
// without a mask.
template <class L, class LineOf, class Whole, class Own, class Load>
__device__ inline void bring_items(const Ring<L>& ring, const Work& work, LineOf line, const int* tile, const int* mask,
                                   Whole whole, Own own, Load load) {
  ptx::reg_dealloc<L::kBringRegisters>();
  if (threadIdx.x > L::kMath) return;
  Place<L::kItems> at;
  Place<L::kStages> stage;
  const auto announce = [&](const Item& item) {
    const uint32_t full = ring.own_full(at.at());
    ptx::mbar_wait(ring.empty_of(full), at.phase() ^ 1u);
    ring.item(at.at()) = item;
    return full;
  };
  // Where own tiles have room for one item, those of the next come when the last one ends; its first stages need not
  // wait for that.
  int ahead = 0;
  work.each([&](const Item& item) {
    Line lines[L::kAll];
#pragma unroll
    for (int l = 0; l < L::kAll; ++l) lines[l] = line(item.place * L::kAll + l);
    bring(
        stage, ring, lines, tile, mask, ahead,
        [&] {
          const uint32_t full = announce(item);
          ptx::mbar_arrive_expect_tx(full, L::kAll * L::kOwn);
#pragma unroll
          for (int l = 0; l < L::kAll; ++l) own(ring.own(at.at(), l), full, item.place * L::kAll + l, item.head);
          at.advance();
        },
        [&](int l, int i) { return whole(item.place * L::kAll + l, i); },
        [&](uint32_t to, uint32_t bar, int i) { load(to, bar, i, item.head); });
    ahead = L::kItems == 1 ? L::kStages : 0;
  });
  ptx::mbar_arrive(announce({kNoMore, 0}));
}

// By all threads of a warpgroup: body(an item's place in the ring, which of the warpgroups this one is for it) for each
// of the block's; body must release the item. Warpgroups take turns: in causal attention some lines are the longer
// ones, and a warpgroup that had them always would hold up the ring.
template <class L, class Body>
__device__ inline void each_item(const Ring<L>& ring, Body body) {
#pragma unroll 1
  for (Place<L::kItems> item;; item.advance()) {
    ptx::mbar_wait(ring.own_full(item.at()), item.phase());
    if (ring.item(item.at()).head == kNoMore) return;
    body(item.at(), (threadIdx.x / 128 + item.at()) % L::kGroups);
  }
}

// A warpgroup's tile: where it lies, and of each of the warpgroup's lines whether it meets the tile, and sees all of
// it.
template <class L>
struct Met : Place<L::kStages> {
  bool met[L::kLines], whole[L::kLines];
};
// Whether any of the warpgroup's lines meets the stage, once it is full.
template <class L>
__device__ inline bool look(Met<L>& tile, const Ring<L>& ring, int group) {
  ptx::mbar_wait(ring.full(tile.at()), tile.phase());
  bool any = false;
#pragma unroll
  for (int l = 0; l < L::kLines; ++l) {
    const int id = ring.note(tile.at()).id[group * L::kLines + l];
    tile.met[l] = id != kNotMet, tile.whole[l] = id == kWhole;
    any |= tile.met[l];
  }
  return any;
}
// Whether all of them do.
template <class L>
__device__ inline bool all_of(const Met<L>& tile) {
  bool all = true;
#pragma unroll
  for (int l = 0; l < L::kLines; ++l) all &= tile.met[l];
  return all;
}
// From here on, the first stage that this warpgroup meets; false at the item's end, and the next item's first stage.
// Nothing may be held meanwhile: the stages to come may want its place.
template <class L>
__device__ inline bool find(Met<L>& tile, const Ring<L>& ring, int group) {
  while (!look(tile, ring, group)) {
    const bool last = ring.note(tile.at()).index == kNoMore;
    ring.release(ring.full(tile.at()));
    tile.advance();
    if (last) return false;
  }
  return true;
}

}  // namespace attention
}  // namespace cuda
}  // namespace igpt
