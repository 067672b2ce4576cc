// palette_assign:  token = argmin_j d_j, lowest j on ties    d = (dr*dr + dg*dg) + db*db    dr = x_r - c_r; g, b alike
//                  x = u / 127.5 - 1 for uint8 pixels
//
// pixels [N, 3] u8 or f32   palette [K, 3] f32, K <= 4096   tokens [N] i64, i32 or i16
// table i16 [2^24], optional: what palette_table has made of this palette, for uint8 pixels
//
// Every operation of d is rounded to float32 on its own, so that tokens are the CPU's to the bit. Without a table every
// distance is computed (nearest.cuh): 5,632 operations a pixel of K = 512, beside 5 to 20 bytes.
//
// With it a pixel costs some 36 operations, 3 bytes read, 2 (or 8) written, and a gather from 33.5 MB that L2 holds.
// The gather decides: L1 finds its lines one after the other, so lanes are neighbours in the picture, and where those
// differ by a few levels, 32 of them need a few lines of 4^3 colours. A pixel's bytes are loaded one by one,
// wherever the tensor starts; all gathers of a thread are under way before the first is used. Colourful thumbnails and
// random colours need a line a lane whatever the order: of the benchmarks' photographs 30 in 32, and an L1 of 1,400
// lines leaves 0.79 sectors of 32 bytes a pixel to L2. A table of 32^3 cells in shared memory would need no L2, but
// most cells of 512 centres have 2 to 5 candidates, whose exact distances cost 16 bytes of shared memory and 11
// operations each: 126 Gpixel/s of any kind.
//
// sass palette_assign_kernel<u8, i16>: LDS = 4, LOCAL = 0
#include <algorithm>

#include "nearest.cuh"

namespace igpt {
namespace cuda {

constexpr int kEach = 8;  // pixels of a thread in the lookup, 32 apart
constexpr int kLookupThreads = 256, kLookupBlock = kLookupThreads * kEach;

template <class T, class Token>
__global__ void __launch_bounds__(kThreads) palette_assign_kernel(Token* tokens,         // [N]
                                                                  const T* pixels,       // [N, 3]
                                                                  const float* palette,  // [K, 3]
                                                                  int64_t N, int K) {
  STATIC_SMEM(float4, centers, kTile);
  STATIC_SMEM(float, levels, 256);
  fill_levels(levels);
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  int token[kPixels];
  nearest(token, pixels, first, N, palette, K, {centers, levels});
#pragma unroll
  for (int p = 0; p < kPixels; ++p)
    if (first + p * kThreads < N) tokens[first + p * kThreads] = Token(token[p]);
}

template <class Token>
__global__ void __launch_bounds__(kLookupThreads) palette_lookup_kernel(Token* tokens,          // [N]
                                                                        const uint8_t* pixels,  // [N, 3]
                                                                        const uint16_t* table,  // [2^24]
                                                                        int64_t N) {
  const int64_t first = int64_t(blockIdx.x) * kLookupBlock + threadIdx.x / 32 * (32 * kEach) + threadIdx.x % 32;
  const auto look_up = [&]<bool kWhole>() {
    uint32_t at[kEach];
    uint16_t token[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const uint8_t* rgb = pixels + 3 * first + 96 * k;
      at[k] = 0;
      if (kWhole || first + 32 * k < N)
        at[k] = uint32_t(__ldcs(rgb)) << 16 | uint32_t(__ldcs(rgb + 1)) << 8 | __ldcs(rgb + 2);
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) token[k] = table[table_index(at[k])];
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (kWhole || first + 32 * k < N) __stcs(tokens + first + 32 * k, Token(token[k]));
  };
  if (first - threadIdx.x % 32 + 32 * kEach <= N)
    look_up.template operator()<true>();
  else
    look_up.template operator()<false>();
}

// ---- launchers ----

template <class Token>
static void lookup(const View& tokens, const View& pixels, const View& table, Stream stream) {
  const int64_t N = pixels.rows();
  LAUNCH((palette_lookup_kernel<Token>), unsigned((N + kLookupBlock - 1) / kLookupBlock), kLookupThreads, 0, stream,
         tokens.as<Token>(), pixels.as<uint8_t>(), table.as<uint16_t>(), N);
}

template <class T, class Token>
static void assign(const View& tokens, const View& pixels, const View& palette, const View& table, Stream stream) {
  const int64_t N = pixels.rows();
  if (N == 0) return;
  const OnDevice device(pixels);
  if (table) return lookup<Token>(tokens, pixels, table, stream);
  LAUNCH((palette_assign_kernel<T, Token>), unsigned((N + kBlock - 1) / kBlock), kThreads, 0, stream,
         tokens.as<Token>(), pixels.as<T>(), palette.as<float>(), N, int(palette.size[0]));
}

static void palette_assign(View tokens, View pixels, View palette, View table, Stream stream) {
  check_colors(pixels, palette);
  check_table(table, pixels);
  IGPT_CHECK(tokens.dense() && tokens.numel() == pixels.rows(), "palette_assign: tokens must be dense, one a pixel");
  const auto write = [&]<class Token>(Token) {
    if (pixels.dtype == DType::u8) return assign<uint8_t, Token>(tokens, pixels, palette, table, stream);
    if (pixels.dtype == DType::f32) return assign<float, Token>(tokens, pixels, palette, table, stream);
    refuse("palette_assign: pixels must be uint8 or float32");
  };
  if (tokens.dtype == DType::i64) return write(int64_t());
  if (tokens.dtype == DType::i32) return write(int32_t());
  if (tokens.dtype == DType::i16) return write(int16_t());
  refuse("palette_assign: tokens must be int64, int32 or int16");
}

void fill_palette(Ops& t) {
  t.palette_assign = palette_assign;
}

}  // namespace cuda
}  // namespace igpt
