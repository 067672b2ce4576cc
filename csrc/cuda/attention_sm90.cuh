// What Hopper's attention kernels compute with: tiles of 64 rows that TMA brings and wgmma reads, and the products of a
// warpgroup that owns 64 rows.
#pragma once
#include "attention_ring.cuh"
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
__device__ inline int first_row(int thread) {
  return thread % 128 / 32 * 16 + thread % 32 / 4;
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

// A warpgroup's own tile as the left operand: in registers, or where it lies.
template <int D>
using Operand64 = uint32_t[D / 16][4];
template <int D, bool registers>
using Own = std::conditional_t<registers, Operand64<D>, uint32_t>;
__device__ inline void take(uint32_t& x, uint32_t tile) {
  x = __shfl_sync(0xffffffffu, tile, 0);
}
template <int steps>
__device__ inline void take(uint32_t (&x)[steps][4], uint32_t tile) {
  using P = Panels<16 * steps>;
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
#pragma unroll
  for (int d = 0; d < steps; ++d) {
    const int chunk = d * 16 % P::kWidth / 8 + half, trade = P::kWidth == 64 ? row & 7 : row / 2 & 3;
    ptx::ldmatrix(x[d], tile + d * 16 / P::kWidth * P::kBytes + row * P::kSpan + (chunk ^ trade) * 16);
  }
}

template <int D, class T>
__device__ inline void start_scores(Scores64& s, const Operand64<D>& a, uint32_t b) {
  using P = Panels<D>;
  const uint64_t y = ptx::matrix_descriptor(b, 16, 8 * P::kSpan, P::kSwizzle);
  ptx::wgmma_fence();
#pragma unroll
  for (int d = 0; d < D; d += 16)
    ptx::wgmma<kTile, T>(s, a[d / 16], behind(y, d / P::kWidth * P::kBytes + d % P::kWidth * 2), d > 0);
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

// -inf where bits(row of the warpgroup's tile) does not have a column's bit. What few tiles ask for is made anew for
// each of them: it would take registers from those that do not.
template <class Bits>
__device__ inline void hide(Scores64& s, Bits bits) {
  const int thread = ptx::thread_again();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint64_t seen = bits(first_row(thread) + 8 * r) >> (thread % 4 * 2);
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
