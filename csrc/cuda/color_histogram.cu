// color_histogram:  counts[r << 16 | g << 8 | b] += 1 for every pixel
//
// counts i64 [2^24]   pixels u8 [N, 3]   workspace i16 [tiles, 16896], optional, at 16 bytes
//
// Atomics in L2 decide: equal addresses take turns, one a clock, and all together some 40 G/s, where 3 bytes a pixel
// would allow 1,400. So equal neighbours among a thread's 16 are one addition, and a block counts the 8192 colours that
// it meets first in shared memory: black, white, flat and smooth pictures stay there. What is left are many colours
// that are rare. Without a workspace each is an atomic. With one they are sorted, so many tiles at a time:
//   1. A block sorts a tile of 16,384 pixels by the upper 9 bits of their colours, in shared memory, and writes the
//      lower 15 as one row, and where each of the 512 buckets ends in it.
//   2. A block has a bucket of half the tiles: it counts its 2^15 colours in shared memory and adds what it found.
// That reads 3 bytes a pixel, writes and reads 2, and leaves one atomic a colour, half the tiles and round.
//
// Whole numbers are added, so their order changes no bit, nor does it matter which colours a block keeps. Where pixels
// do not start at 16 bytes, and for the last ones, it goes byte by byte.
//
// sass color_count_kernel: LOCAL = 0
#include <algorithm>

#include "palette.cuh"

namespace igpt {
namespace cuda {

constexpr int kPixels = 16;                           // of a thread at a time
constexpr int kThreads = 512, kRounds = 8;            // without a workspace: so many times 16 pixels between flushes
constexpr int64_t kMostBlocks = 396;                  // three for each multiprocessor of an H200
constexpr int kSlots = 1 << 13, kTagShift = 21;       // a slot: 11 bits of its colour's hash, which the other 13 found,
constexpr uint32_t kCountOf = (1u << kTagShift) - 1;  // and how many pixels
constexpr uint32_t kHash = 0x9e3779, kHashBack = 0xb382c9, kHashed = kTableColors - 1;
static_assert((kHash * kHashBack & kHashed) == 1, "colours follow from their hashes");
static_assert(kRounds * kThreads * kPixels <= kCountOf, "a block's pixels between two flushes");

constexpr int kSortThreads = 1024, kTile = kSortThreads * kPixels;
constexpr int kBuckets = 512, kKeys = kTableColors / kBuckets, kKeyBits = 15, kRow = kTile + kBuckets;
constexpr int kMostTiles = 4096, kSortBlocks = 132, kSplits = 2;
static_assert(kMostTiles / kSortBlocks * kTile * 2 <= kCountOf, "a block's pixels in one launch");
constexpr uint32_t kAll = 0xffffffffu;

// Whether the block counts this colour itself; it then has.
__device__ inline bool kept(uint32_t* slots, uint32_t color, uint32_t run) {
  const uint32_t hash = color * kHash & kHashed, tag = hash << kTagShift;
  uint32_t* slot = slots + (hash >> 11);
  const uint32_t found = atomicCAS(slot, 0u, tag | run);
  if (found == 0) return true;
  if ((found ^ tag) >> kTagShift != 0) return false;
  atomicAdd(slot, run);
  return true;
}

__device__ inline void clear(uint32_t* words, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

// Adds what the block has kept, and empties its slots.
__device__ inline void flush(Sum* counts, uint32_t* slots) {
  for (uint32_t s = threadIdx.x; s < kSlots; s += blockDim.x) {
    const uint32_t found = slots[s];
    if (found) atomicAdd(&counts[(s << 11 | found >> kTagShift) * kHashBack & kHashed], Sum(found & kCountOf));
    slots[s] = 0;
  }
}

// Pixels first to first + 15, as far as there are N; returns how many.
__device__ inline int load(uint32_t (&colors)[kPixels], const uint8_t* pixels, int64_t first, int64_t N, bool wide) {
  const int there = int(max(min(N - first, int64_t(kPixels)), int64_t(0)));
  if (wide && there == kPixels) {
    const uint4* from = reinterpret_cast<const uint4*>(pixels + 3 * first);
    const uint4 x = __ldcs(from), y = __ldcs(from + 1), z = __ldcs(from + 2);
    const uint32_t word[12] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w, z.x, z.y, z.z, z.w};
    unpack(colors, word);
  } else {
#pragma unroll
    for (int k = 0; k < kPixels; ++k) colors[k] = k < there ? color_at(pixels, first + k) : 0;
  }
  return there;
}

// Calls each(k, length) at the last pixel of each run of equal colours.
template <class F>
__device__ inline void for_runs(const uint32_t (&colors)[kPixels], int there, F each) {
  uint32_t run = 0;
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    if (k >= there) continue;
    ++run;
    if (k + 1 < there && colors[k] == colors[k + 1 < kPixels ? k + 1 : k]) continue;
    each(k, run);
    run = 0;
  }
}

__global__ void __launch_bounds__(kThreads) color_histogram_kernel(Sum* counts,            // [2^24]
                                                                   const uint8_t* pixels,  // [N, 3]
                                                                   int64_t N, bool wide) {
  STATIC_SMEM(uint32_t, slots, kSlots);
  clear(slots, kSlots);
  __syncthreads();
  const int64_t packs = (N + kPixels - 1) / kPixels, each = (packs + gridDim.x - 1) / gridDim.x;
  const int64_t end = min(packs, each * (blockIdx.x + 1));
  for (int64_t begin = each * blockIdx.x; begin < end; begin += kRounds * kThreads) {
    const int64_t stop = min(end, begin + kRounds * kThreads);
    for (int64_t p = begin + threadIdx.x; p < stop; p += kThreads) {
      uint32_t colors[kPixels];
      const int there = load(colors, pixels, p * kPixels, N, wide);
      for_runs(colors, there, [&](int k, uint32_t run) {
        if (!kept(slots, colors[k], run)) atomicAdd(&counts[colors[k]], Sum(run));
      });
    }
    __syncthreads();
    flush(counts, slots);
    __syncthreads();
  }
}

struct SortSmem {
  uint32_t slots[kSlots], bucket[kBuckets], warps[kBuckets / 32], total;
  alignas(16) uint16_t keys[kTile];
};

// bucket = where each begins, from how many it has; `ends` = where each ends. For the whole block.
__device__ inline void prefix(SortSmem& s, uint16_t* ends) {
  const int j = threadIdx.x, lane = j % 32;
  const uint32_t own = j < kBuckets ? s.bucket[j] : 0;
  uint32_t end = own;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t before = __shfl_up_sync(kAll, end, d);
    if (lane >= d) end += before;
  }
  if (j < kBuckets && lane == 31) s.warps[j / 32] = end;
  __syncthreads();
  if (j < kBuckets) {
    for (int w = 0; w < j / 32; ++w) end += s.warps[w];
    s.bucket[j] = end - own, ends[j] = uint16_t(end);
    if (j == kBuckets - 1) s.total = end;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kSortThreads, 1) color_sort_kernel(Sum* counts,            // [2^24]
                                                                     uint16_t* rows,         // [tiles, kRow]
                                                                     const uint8_t* pixels,  // [N, 3]
                                                                     int64_t N, int tiles, bool wide) {
  DYN_SMEM(SortSmem, smem);
  SortSmem& s = *smem;
  constexpr uint32_t kInside = kAll, kKept = kAll - 1;  // of a pixel that is not its run's last, or counted already
  clear(s.slots, kSlots);
  const int each = (tiles + int(gridDim.x) - 1) / int(gridDim.x), first = each * int(blockIdx.x);
  for (int tile = first; tile < min(first + each, tiles); ++tile) {
    clear(s.bucket, kBuckets);
    uint32_t colors[kPixels], rank[kPixels];
    const int there = load(colors, pixels, int64_t(tile) * kTile + threadIdx.x * kPixels, N, wide);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPixels; ++k) rank[k] = kInside;
    for_runs(colors, there, [&](int k, uint32_t run) {
      rank[k] = kept(s.slots, colors[k], run) ? kKept : atomicAdd(&s.bucket[colors[k] >> kKeyBits], run);
    });
    __syncthreads();

    uint16_t* row = rows + int64_t(tile) * kRow;
    prefix(s, row + kTile);
    uint32_t at = kKept;
#pragma unroll
    for (int k = kPixels - 1; k >= 0; --k) {  // a run's last pixel comes first
      if (k >= there) continue;
      if (rank[k] == kKept)
        at = kKept;
      else if (rank[k] != kInside)
        at = s.bucket[colors[k] >> kKeyBits] + rank[k];
      else if (at != kKept)
        ++at;
      if (at != kKept) s.keys[at] = uint16_t(colors[k] & (kKeys - 1));
    }
    __syncthreads();
    for (uint32_t v = threadIdx.x; v * 8 < s.total; v += kSortThreads)
      reinterpret_cast<uint4*>(row)[v] = reinterpret_cast<const uint4*>(s.keys)[v];
  }
  __syncthreads();
  flush(counts, s.slots);
}

// A warp reads where its bucket lies in 32 tiles, then four tiles at a time, 64 keys of each and the rest.
__global__ void __launch_bounds__(kSortThreads, 1) color_count_kernel(Sum* counts,           // [2^24]
                                                                      const uint16_t* rows,  // [tiles, kRow]
                                                                      int tiles) {
  DYN_SMEM(uint32_t, bins);  // [kKeys]
  clear(bins, kKeys);
  __syncthreads();
  const int bucket = blockIdx.x / kSplits, split = blockIdx.x % kSplits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = (split * 32 + warp) * 32; first < tiles; first += kSplits * kSortThreads) {
    int start = 0, stop = 0;
    if (first + lane < tiles) {
      const uint16_t* ends = rows + int64_t(first + lane) * kRow + kTile;
      start = bucket ? ends[bucket - 1] : 0, stop = ends[bucket];
    }
    for (int t = 0; t < 32; t += 4) {
      int at[4], end[4];
      uint32_t key[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        at[i] = __shfl_sync(kAll, start, t + i) + lane, end[i] = __shfl_sync(kAll, stop, t + i);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          key[i][h] = at[i] + 32 * h < end[i] ? rows[int64_t(first + t + i) * kRow + at[i] + 32 * h] : kAll;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (key[i][h] != kAll) atomicAdd(&bins[key[i][h]], 1u);
        for (int k = at[i] + 64; k < end[i]; k += 32) atomicAdd(&bins[rows[int64_t(first + t + i) * kRow + k]], 1u);
      }
    }
  }
  __syncthreads();
  for (int key = threadIdx.x; key < kKeys; key += kSortThreads)
    if (bins[key]) atomicAdd(&counts[bucket * kKeys + key], Sum(bins[key]));
}

// ---- launcher ----

static void color_histogram(View counts, View pixels, View workspace, Stream stream) {
  check_histogram(counts, pixels);
  const int64_t N = pixels.rows();
  if (N == 0) return;
  const OnDevice device(pixels);
  const bool wide = starts_at_sixteen(pixels);
  // Cards but for A100 and H100 have less shared memory than a count for each key of a bucket takes.
  const bool sorted = workspace && device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kKeys * 4;
  if (!sorted) {
    const int64_t block = kThreads * kPixels, blocks = std::min((N + block - 1) / block, kMostBlocks);
    LAUNCH(color_histogram_kernel, unsigned(blocks), kThreads, 0, stream, counts.as<Sum>(), pixels.as<uint8_t>(), N,
           wide);
    return;
  }
  IGPT_CHECK(workspace.dtype == DType::i16 && workspace.dense() && workspace.ndim == 2 && workspace.cols() == kRow &&
                 workspace.size[0] >= 1 && starts_at_sixteen(workspace),
             "color_histogram: the workspace must be dense int16 [tiles, 16896] at a multiple of 16 bytes");
  allow_shared(color_sort_kernel, sizeof(SortSmem));
  allow_shared(color_count_kernel, kKeys * 4);
  const int64_t most = std::min(workspace.size[0], int64_t(kMostTiles)) * kTile;
  for (int64_t first = 0; first < N; first += most) {
    const int64_t some = std::min(most, N - first);
    const int tiles = int((some + kTile - 1) / kTile);
    LAUNCH(color_sort_kernel, unsigned(std::min(tiles, kSortBlocks)), kSortThreads, sizeof(SortSmem), stream,
           counts.as<Sum>(), workspace.as<uint16_t>(), pixels.as<uint8_t>() + 3 * first, some, tiles, wide);
    LAUNCH(color_count_kernel, unsigned(kBuckets * kSplits), kSortThreads, size_t(kKeys) * 4, stream, counts.as<Sum>(),
           workspace.as<uint16_t>(), tiles);
  }
}

void fill_color_histogram(Ops& t) {
  t.color_histogram = color_histogram;
}

}  // namespace cuda
}  // namespace igpt
