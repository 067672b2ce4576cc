// palette_decode:   pixels[i] = colors[tokens[i]]                        tokens i64, i32 or i16 [N]   colors u8 [K, 3]
// color_histogram:  counts[r << 16 | g << 8 | b] += 1 for every pixel    counts i64 [2^24]   pixels u8 [N, 3]
//
// Decoding moves 5 bytes a pixel from int16 tokens, 11 from int64: bound by bandwidth, 860 and 390 Gpixel/s at 4.3
// TB/s. A warp has 512 pixels. Its lanes load 4 or 8 tokens at a time, find the colours in shared memory, as words, and
// leave them packed in shared memory too, from where the warp stores 512 neighbouring bytes at a time. A token out of
// range writes black; bad becomes the least index of one, which is a minimum and has no order.
//
// The histogram reads 3 bytes a pixel and is bound by atomics in L2: equal addresses take turns, one a clock, and all
// together some 40 G/s. So equal neighbours among a thread's 16 are one addition, and a block counts the 8192 colours
// that it meets first in shared memory, anew every 65,536 pixels: black, white, flat and smooth pictures stay there.
// What is left are colours that are rare, one atomic a pixel. They add whole numbers, so their order changes no bit,
// nor does it matter which colours a block keeps.
//
// Where a tensor does not start at 16 bytes, and for the last pixels, both go byte by byte.
//
// sass palette_decode_kernel<i16>: LDG.128 = 2, LDG = 0, STG.128 = 3, STG = 0, LDS = 16, LOCAL = 0
#include <algorithm>

#include "palette.cuh"

namespace igpt {
namespace cuda {

constexpr int kThreads = 256, kPixels = 16;  // of a thread at a time
constexpr int64_t kMostBlocks = 1056;      // eight for each multiprocessor of an H200: colours are staged once a block
constexpr int kTilePixels = 32 * kPixels;  // of a warp

// 4 words 0x00bbggrr (r in the lowest byte) are 12 bytes in memory.
__device__ inline void pack(uint32_t* out, const uint32_t* rgb) {
  out[0] = rgb[0] | rgb[1] << 24, out[1] = rgb[1] >> 8 | rgb[2] << 16, out[2] = rgb[2] >> 16 | rgb[3] << 8;
}

template <class Token>
__global__ void __launch_bounds__(kThreads) palette_decode_kernel(uint8_t* pixels,        // [N, 3]
                                                                  Sum* bad,               // [1], all ones at first
                                                                  const Token* tokens,    // [N]
                                                                  const uint8_t* colors,  // [K, 3]
                                                                  int64_t N, int K, bool wide) {
  DYN_SMEM(uint32_t, words);  // [K + 1], the last black
  STATIC_SMEM(uint4, stages, kThreads * 3);
  for (int j = threadIdx.x; j < K; j += kThreads)
    words[j] = colors[3 * j] | uint32_t(colors[3 * j + 1]) << 8 | uint32_t(colors[3 * j + 2]) << 16;
  if (threadIdx.x == 0) words[K] = 0;
  __syncthreads();
  // Of a token out of range K, whose word is black.
  const auto known = [=](Token token) {
    if constexpr (sizeof(Token) == 8) return token >> 32 == 0 ? min(uint32_t(token), uint32_t(K)) : uint32_t(K);
    return min(uint32_t(int(token)), uint32_t(K));
  };
  Sum first = ~Sum(0);
  int64_t bad_tile = -1;  // the first that has a bad token of this thread
  const auto found_bad = [&](Sum i) { first = first < i ? first : i; };

  constexpr int V = 16 / sizeof(Token), G = V < 4 ? 4 : V;  // tokens of a load, and of a step
  const int lane = threadIdx.x % 32;
  uint4* stage = stages + threadIdx.x / 32 * 96;  // the warp's 1536 bytes
  const int64_t step = int64_t(gridDim.x) * kThreads, tiles = wide ? N / kTilePixels : 0;
  const int64_t mine = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t tile = mine / 32; tile < tiles; tile += step / 32) {
    const Token* from = tokens + tile * kTilePixels + lane * G;
    Pack<Token, V> given[kPixels / V];
#pragma unroll
    for (int v = 0; v < kPixels / V; ++v)
      given[v] = *reinterpret_cast<const Pack<Token, V>*>(from + v * V / G * (32 * G) + v * V % G);
    uint32_t most = 0;
    __syncwarp();  // the last tile has left the stage
#pragma unroll
    for (int s = 0; s < kPixels / G; ++s) {
      uint32_t rgb[G], out[G / 4 * 3];
#pragma unroll
      for (int k = 0; k < G; ++k) {
        const uint32_t token = known(given[(s * G + k) / V].v[(s * G + k) % V]);
        rgb[k] = words[token], most = max(most, token);
      }
#pragma unroll
      for (int q = 0; q < G / 4; ++q) pack(out + 3 * q, rgb + 4 * q);
      uint32_t* to = reinterpret_cast<uint32_t*>(stage) + (s * 32 + lane) * (G / 4 * 3);
      if constexpr (G == 8)
#pragma unroll
        for (int v = 0; v < 3; ++v) reinterpret_cast<uint2*>(to)[v] = make_uint2(out[2 * v], out[2 * v + 1]);
      else
#pragma unroll
        for (int v = 0; v < 3; ++v) to[v] = out[v];
    }
    __syncwarp();
    uint4* to = reinterpret_cast<uint4*>(pixels + tile * (kTilePixels * 3)) + lane;
#pragma unroll
    for (int v = 0; v < 3; ++v) __stcs(to + 32 * v, stage[32 * v + lane]);
    if (most == uint32_t(K) && bad_tile < 0) bad_tile = tile;
  }
  for (int k = 0; bad_tile >= 0 && k < kPixels; ++k) {
    const int64_t i = bad_tile * kTilePixels + (k / G * 32 + lane) * G + k % G;
    if (known(tokens[i]) == uint32_t(K)) found_bad(Sum(i));
  }
  for (int64_t i = tiles * kTilePixels + mine; i < N; i += step) {
    const uint32_t token = known(tokens[i]), rgb = words[token];
    pixels[3 * i] = uint8_t(rgb), pixels[3 * i + 1] = uint8_t(rgb >> 8), pixels[3 * i + 2] = uint8_t(rgb >> 16);
    if (token == uint32_t(K)) found_bad(Sum(i));
  }
  if (first != ~Sum(0)) atomicMin(bad, first);
}

constexpr int kCountThreads = 512, kCountRounds = 8;  // packs of 16 pixels of a thread, between two flushes
constexpr int64_t kMostCountBlocks = 528;             // four for each multiprocessor of an H200
constexpr int kSlots = 1 << 13, kTagShift = 21;       // a slot: 11 bits of its colour's hash, which the other 13 found,
constexpr uint32_t kCountOf = (1u << kTagShift) - 1;  // and how many pixels
static_assert(kCountRounds * kCountThreads * kPixels <= kCountOf, "a block's pixels between two flushes");
constexpr uint32_t kHash = 0x9e3779, kHashBack = 0xb382c9, kHashed = kTableColors - 1;
static_assert((kHash * kHashBack & kHashed) == 1, "colours follow from their hashes");

__device__ inline void count(Sum* counts, uint32_t* slots, uint32_t color, uint32_t run) {
  const uint32_t hash = color * kHash & kHashed, tag = hash << kTagShift;
  uint32_t* slot = slots + (hash >> 11);
  const uint32_t found = atomicCAS(slot, 0u, tag | run);
  if (found == 0) return;
  if ((found ^ tag) >> kTagShift == 0)
    atomicAdd(slot, run);
  else
    atomicAdd(&counts[color], Sum(run));
}

__global__ void __launch_bounds__(kCountThreads) color_histogram_kernel(Sum* counts,            // [2^24]
                                                                        const uint8_t* pixels,  // [N, 3]
                                                                        int64_t N, bool wide) {
  STATIC_SMEM(uint32_t, slots, kSlots);
  for (int s = threadIdx.x; s < kSlots; s += kCountThreads) slots[s] = 0;
  __syncthreads();
  const int64_t packs = (N + kPixels - 1) / kPixels, each = (packs + gridDim.x - 1) / gridDim.x;
  const int64_t end = min(packs, each * (blockIdx.x + 1));
  for (int64_t begin = each * blockIdx.x; begin < end; begin += kCountRounds * kCountThreads) {
    const int64_t stop = min(end, begin + kCountRounds * kCountThreads);
    for (int64_t p = begin + threadIdx.x; p < stop; p += kCountThreads) {
      if (!wide || p * kPixels + kPixels > N) {
        for (int64_t i = p * kPixels; i < min(N, p * kPixels + kPixels); ++i)
          count(counts, slots, color_at(pixels, i), 1);
        continue;
      }
      uint32_t colors[kPixels];
      const uint4* from = reinterpret_cast<const uint4*>(pixels + p * 48);
      const uint4 x = __ldcs(from), y = __ldcs(from + 1), z = __ldcs(from + 2);
      const uint32_t word[12] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w, z.x, z.y, z.z, z.w};
      unpack(colors, word);
      uint32_t run = 1;
#pragma unroll
      for (int k = 1; k < kPixels; ++k) {
        if (colors[k] != colors[k - 1]) {
          count(counts, slots, colors[k - 1], run);
          run = 0;
        }
        ++run;
      }
      count(counts, slots, colors[kPixels - 1], run);
    }
    __syncthreads();
    for (uint32_t s = threadIdx.x; s < kSlots; s += kCountThreads) {
      const uint32_t found = slots[s];
      if (found == 0) continue;
      slots[s] = 0;
      atomicAdd(&counts[(s << 11 | found >> kTagShift) * kHashBack & kHashed], Sum(found & kCountOf));
    }
    __syncthreads();
  }
}

// ---- launchers ----

static unsigned blocks_for(int64_t N, bool wide) {
  const int64_t each = kThreads * (wide ? kPixels : 1);
  return unsigned(std::min((N + each - 1) / each, kMostBlocks));
}

static void palette_decode(View pixels, View bad, View tokens, View colors, Stream stream) {
  const int64_t N = tokens.numel(), K = colors.rows();
  IGPT_CHECK(tokens.dense(), "palette_decode: tokens must be dense");
  IGPT_CHECK(pixels.dtype == DType::u8 && pixels.dense() && pixels.numel() == 3 * N,
             "palette_decode: pixels must be dense uint8, three a token");
  IGPT_CHECK(colors.dtype == DType::u8 && colors.dense() && colors.cols() == 3 && K >= 1 && K <= kMaxColors,
             "palette_decode: colors must be dense uint8 [K, 3] with 1 <= K <= 4096");
  IGPT_CHECK(bad.dtype == DType::i64 && bad.numel() == 1, "palette_decode: bad must be one int64");
  const OnDevice device(tokens);
  check_cuda(cudaMemsetAsync(bad.data, 0xff, 8, stream_of(stream)), "cudaMemsetAsync");
  if (N == 0) return;
  const bool wide = starts_at_sixteen(pixels) && starts_at_sixteen(tokens);
  const auto run = [&]<class Token>(Token) {
    LAUNCH((palette_decode_kernel<Token>), blocks_for(N, wide), kThreads, size_t(K + 1) * 4, stream,
           pixels.as<uint8_t>(), bad.as<Sum>(), tokens.as<Token>(), colors.as<uint8_t>(), N, int(K), wide);
  };
  if (tokens.dtype == DType::i64) return run(int64_t());
  if (tokens.dtype == DType::i32) return run(int32_t());
  if (tokens.dtype == DType::i16) return run(int16_t());
  refuse("palette_decode: tokens must be int64, int32 or int16");
}

static void color_histogram(View counts, View pixels, Stream stream) {
  IGPT_CHECK(pixels.dtype == DType::u8 && pixels.dense() && pixels.cols() == 3,
             "color_histogram: pixels must be dense uint8 [N, 3]");
  IGPT_CHECK(counts.dtype == DType::i64 && counts.dense() && counts.numel() == kTableColors,
             "color_histogram: counts must be dense int64 [2^24]");
  const int64_t N = pixels.rows();
  if (N == 0) return;
  const OnDevice device(pixels);
  const bool wide = starts_at_sixteen(pixels);
  const int64_t block = kCountThreads * kPixels, blocks = std::min((N + block - 1) / block, kMostCountBlocks);
  LAUNCH(color_histogram_kernel, unsigned(blocks), kCountThreads, 0, stream, counts.as<Sum>(), pixels.as<uint8_t>(), N,
         wide);
}

void fill_palette_decode(Ops& t) {
  t.palette_decode = palette_decode;
  t.color_histogram = color_histogram;
}

}  // namespace cuda
}  // namespace igpt
