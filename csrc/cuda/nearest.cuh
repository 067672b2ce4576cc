// Nearest centres by every distance, which a whole block finds together: for palette_assign and for k-means.
//
// A thread has four pixels in registers and compares them with each centre, which shared memory gives to the whole warp
// in one read of 16 bytes. Bound by arithmetic: 8 operations, a comparison and two selections a distance, 11 K a pixel.
// A d that is not a number counts as infinite.
#pragma once
#include "palette.cuh"

namespace igpt {
namespace cuda {

constexpr int kThreads = 128, kPixels = 4, kBlock = kThreads * kPixels;
constexpr int kTile = 1024;  // centres in shared memory at a time, 16 KB

struct Tables {
  float4* centers;  // [kTile] of shared memory
  float* levels;    // [256]
};

__device__ inline void fill_levels(float* levels) {
  for (int u = threadIdx.x; u < 256; u += kThreads) levels[u] = level(u);
}

__device__ inline float component(const float* pixels, int64_t at, const float*) {
  return pixels[at];
}
__device__ inline float component(const uint8_t* pixels, int64_t at, const float* levels) {
  return levels[pixels[at]];
}

// token[p] becomes that of pixel first + p kThreads, where there is one.
template <class T>
__device__ inline void nearest(int (&token)[kPixels], const T* pixels, int64_t first, int64_t N, const float* palette,
                               int K, const Tables& tables) {
  float x[kPixels][3] = {}, best[kPixels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int64_t i = first + p * kThreads;
    token[p] = 0, best[p] = INFINITY;
    if (i < N)
#pragma unroll
      for (int a = 0; a < 3; ++a) x[p][a] = component(pixels, 3 * i + a, tables.levels);
  }
  for (int begin = 0; begin < K; begin += kTile) {
    const int count = min(kTile, K - begin);
    __syncthreads();  // the last tile's readers are done
    for (int j = threadIdx.x; j < count; j += kThreads) {
      tables.centers[j] = center_of(palette, begin + j);
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const float4 c = tables.centers[j];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const float d = distance(x[p][0], x[p][1], x[p][2], c);
        if (d < best[p]) best[p] = d, token[p] = begin + j;
      }
    }
  }
}

}  // namespace cuda
}  // namespace igpt
