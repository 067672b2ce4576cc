// What the palette's kernels share: 8-bit levels, distances rounded as on the CPU, the table's order, checks.
#pragma once
#include "../common/palette.h"
#include "device.cuh"
#include "launch.h"

namespace igpt {
namespace cuda {

using Sum = unsigned long long;  // what 64-bit atomics add

constexpr int kMaxColors = 4096;
constexpr int kTableColors = 1 << 24;

// Every operation is rounded to float32 on its own: the _rn intrinsics are never fused.
__device__ inline float level(int u) {
  return __fsub_rn(__fdiv_rn(float(u), 127.5f), 1.f);
}

__device__ inline float distance(float r, float g, float b, const float4& c) {
  const float dr = __fsub_rn(r, c.x), dg = __fsub_rn(g, c.y), db = __fsub_rn(b, c.z);
  return __fadd_rn(__fadd_rn(__fmul_rn(dr, dr), __fmul_rn(dg, dg)), __fmul_rn(db, db));
}

__device__ inline float4 center_of(const float* palette, int j) {
  return make_float4(palette[3 * j], palette[3 * j + 1], palette[3 * j + 2], 0.f);
}

// Where the table holds a colour 0xrrggbb. Neighbours in colour are neighbours in memory: 12 bits name the box of 16^3
// colours, 3 its cell of 8^3, 3 the 128-byte line of 4^3 colours, and a sector of 32 bytes holds 2 x 2 x 4 of them.
//   r 7654 g 7654 b 7654 | r3 g3 b3 | r2 g2 b2 | r1 g1 | r0 g0 b1 b0
__device__ inline uint32_t table_index(uint32_t p) {
  return (p & 0xf00000) | (p << 4 & 0x0f0000) | (p << 8 & 0x00f000) |  // boxes
         (p >> 8 & 0x000800) | (p >> 1 & 0x000400) | (p << 6 & 0x000200) | (p >> 10 & 0x000100) | (p >> 3 & 0x000080) |
         (p << 4 & 0x000040) | (p >> 12 & 0x000020) | (p >> 5 & 0x000010) | (p >> 13 & 0x000008) | (p >> 6 & 0x000004) |
         (p & 0x000003);
}

// Pixel i as 0xrrggbb, wherever it lies.
__device__ inline uint32_t color_at(const uint8_t* pixels, int64_t i) {
  return uint32_t(pixels[3 * i]) << 16 | uint32_t(pixels[3 * i + 1]) << 8 | pixels[3 * i + 2];
}

// Bytes rgbrgb... as colours 0xrrggbb, four to three words.
template <int N>
__device__ inline void unpack(uint32_t (&colors)[N], const uint32_t* word) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int at = k / 4 * 3, q = k % 4;  // its bytes, r lowest, start in byte 3 q of three words
    const uint32_t v = q == 0   ? word[at]
                       : q == 1 ? word[at] >> 24 | word[at + 1] << 8
                       : q == 2 ? word[at + 1] >> 16 | word[at + 2] << 16
                                : word[at + 2] >> 8;
    colors[k] = (v & 0xff) << 16 | (v & 0xff00) | (v >> 16 & 0xff);
  }
}

static inline bool starts_at_sixteen(const View& v) {
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

static inline void check_palette(const View& palette) {
  IGPT_CHECK(palette.dtype == DType::f32 && palette.dense() && palette.ndim == 2 && palette.cols() == 3 &&
                 palette.size[0] >= 1 && palette.size[0] <= kMaxColors,
             "palette: centres must be dense float32 [K, 3] with 1 <= K <= 4096");
}

static inline void check_colors(const View& pixels, const View& palette) {
  IGPT_CHECK(pixels.dense() && pixels.cols() == 3, "palette: pixels must be dense [..., 3]");
  check_palette(palette);
}

static inline void check_table(const View& table, const View& pixels) {
  if (!table) return;
  IGPT_CHECK(table.dtype == DType::i16 && table.dense() && table.numel() == kTableColors,
             "palette: the table must be dense int16 of 2^24 elements, as palette_table makes it");
  IGPT_CHECK(pixels.dtype == DType::u8, "palette: a table serves uint8 pixels only; give None for float32");
}

}  // namespace cuda
}  // namespace igpt
