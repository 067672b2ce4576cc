// palette_decode:   pixels[i] = colors[tokens[i]]                        tokens i64, i32 or i16 [N]   colors u8 [K, 3]
//
// Decoding moves 5 bytes a pixel from int16 tokens, 11 from int64: bound by bandwidth, 860 and 390 Gpixel/s at 4.3
// TB/s. A warp has 512 pixels. Its lanes load 4 or 8 tokens at a time, find the colours in shared memory, as words, and
// leave them packed in shared memory too, from where the warp stores 512 neighbouring bytes at a time. A token out of
// range writes black; bad becomes the least index of one, which is a minimum and has no order.
//
// Where a tensor does not start at 16 bytes, and for the last pixels, it goes byte by byte.
//
// sass palette_decode_kernel<i16>: LDG.128 = 2, LDG = 0, STG.128 = 3, STG = 0, LDS = 19, LOCAL = 0
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

// ---- launchers ----

static unsigned blocks_for(int64_t N, bool wide) {
  const int64_t each = kThreads * (wide ? kPixels : 1);
  return unsigned(std::min((N + each - 1) / each, kMostBlocks));
}

static void palette_decode(View pixels, View bad, View tokens, View colors, Stream stream) {
  const int64_t N = tokens.numel(), K = colors.rows();
  check_decode(pixels, bad, tokens, colors);
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

void fill_palette_decode(Ops& t) {
  t.palette_decode = palette_decode;
}

}  // namespace cuda
}  // namespace igpt
