// palette_decode:   pixels[i] = colors[tokens[i]]                        tokens i64, i32 or i16 [N]   colors u8 [K, 3]
// color_histogram:  counts[r << 16 | g << 8 | b] += 1 for every pixel    counts i64 [2^24]   pixels u8 [N, 3]
//
// A thread has 16 neighbouring pixels: 48 bytes, three accesses of 16, beside 2 to 8 of tokens. Where a tensor does not
// start at 16 bytes, and for the rest of N / 16, it goes byte by byte.
//
// Decoding moves 5 bytes a pixel from int16 tokens, 11 from int64; colours come from shared memory, as words. Bound by
// bandwidth: 860 and 390 Gpixel/s at 4.3 TB/s. A token out of range writes black; bad becomes the least index of one,
// which is a minimum and has no order.
//
// The histogram reads 3 bytes a pixel. Bound by atomics in L2, one for each run of equal colours among a thread's 16:
// on flat images few, on noise one a pixel. They add whole numbers, so their order changes no bit.
//
// sass palette_decode_kernel<i16>: LDG.128 = 2, LDG = 0, STG.128 = 3, STG = 0, LDS = 16, LOCAL = 0
#include <algorithm>

#include "palette.cuh"

namespace igpt {
namespace cuda {

constexpr int kThreads = 256, kPixels = kPack;
constexpr int64_t kMostBlocks = 1056;  // eight for each multiprocessor of an H200: colours are staged once a block

struct alignas(16) Bytes48 {
  uint32_t word[12];
};

// 16 words 0x00bbggrr (r in the lowest byte) and 48 bytes in memory, 4 pixels to 3 words.
__device__ inline Bytes48 pack(const uint32_t (&rgb)[kPixels]) {
  Bytes48 out;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint32_t a = rgb[4 * q], b = rgb[4 * q + 1], c = rgb[4 * q + 2], d = rgb[4 * q + 3];
    out.word[3 * q] = a | b << 24, out.word[3 * q + 1] = b >> 8 | c << 16, out.word[3 * q + 2] = c >> 16 | d << 8;
  }
  return out;
}

template <class Token>
__global__ void __launch_bounds__(kThreads) palette_decode_kernel(uint8_t* pixels,        // [N, 3]
                                                                  Sum* bad,               // [1], all ones at first
                                                                  const Token* tokens,    // [N]
                                                                  const uint8_t* colors,  // [K, 3]
                                                                  int64_t N, int K, bool wide) {
  DYN_SMEM(uint32_t, words);  // [K]
  for (int j = threadIdx.x; j < K; j += kThreads)
    words[j] = colors[3 * j] | uint32_t(colors[3 * j + 1]) << 8 | uint32_t(colors[3 * j + 2]) << 16;
  __syncthreads();
  Sum first = ~Sum(0);
  const auto color = [&](Token token, int64_t i) {
    if (Sum(int64_t(token)) < Sum(K)) return words[int(token)];
    first = first < Sum(i) ? first : Sum(i);
    return 0u;
  };
  const int64_t step = int64_t(gridDim.x) * kThreads, packs = wide ? N / kPixels : 0;
  const int64_t mine = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t p = mine; p < packs; p += step) {
    const auto given = reinterpret_cast<const Pack<Token, 16 / sizeof(Token)>*>(tokens + p * kPixels);
    uint32_t rgb[kPixels];
    constexpr int V = 16 / sizeof(Token);
#pragma unroll
    for (int v = 0; v < kPixels / V; ++v) {
      const auto some = given[v];
#pragma unroll
      for (int k = 0; k < V; ++k) rgb[V * v + k] = color(some.v[k], p * kPixels + V * v + k);
    }
    const Bytes48 out = pack(rgb);
    uint4* to = reinterpret_cast<uint4*>(pixels + p * 48);
#pragma unroll
    for (int v = 0; v < 3; ++v)
      to[v] = make_uint4(out.word[4 * v], out.word[4 * v + 1], out.word[4 * v + 2], out.word[4 * v + 3]);
  }
  for (int64_t i = packs * kPixels + mine; i < N; i += step) {
    const uint32_t rgb = color(tokens[i], i);
    pixels[3 * i] = uint8_t(rgb), pixels[3 * i + 1] = uint8_t(rgb >> 8), pixels[3 * i + 2] = uint8_t(rgb >> 16);
  }
  if (first != ~Sum(0)) atomicMin(bad, first);
}

__global__ void __launch_bounds__(kThreads) color_histogram_kernel(Sum* counts,            // [2^24]
                                                                   const uint8_t* pixels,  // [N, 3]
                                                                   int64_t N, bool wide) {
  const int64_t step = int64_t(gridDim.x) * kThreads, packs = wide ? N / kPixels : 0;
  const int64_t mine = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t p = mine; p < packs; p += step) {
    uint32_t colors[kPixels];
    unpack48(colors, pixels + p * 48);
    uint32_t last = colors[0];
    Sum run = 1;
#pragma unroll
    for (int k = 1; k < kPixels; ++k) {
      if (colors[k] != last) {
        atomicAdd(&counts[last], run);
        last = colors[k], run = 0;
      }
      ++run;
    }
    atomicAdd(&counts[last], run);
  }
  for (int64_t i = packs * kPixels + mine; i < N; i += step)
    atomicAdd(&counts[uint32_t(pixels[3 * i]) << 16 | uint32_t(pixels[3 * i + 1]) << 8 | pixels[3 * i + 2]], Sum(1));
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
    LAUNCH((palette_decode_kernel<Token>), blocks_for(N, wide), kThreads, size_t(K) * 4, stream, pixels.as<uint8_t>(),
           bad.as<Sum>(), tokens.as<Token>(), colors.as<uint8_t>(), N, int(K), wide);
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
  LAUNCH(color_histogram_kernel, blocks_for(N, wide), kThreads, 0, stream, counts.as<Sum>(), pixels.as<uint8_t>(), N,
         wide);
}

void fill_palette_decode(Ops& t) {
  t.palette_decode = palette_decode;
  t.color_histogram = color_histogram;
}

}  // namespace cuda
}  // namespace igpt
