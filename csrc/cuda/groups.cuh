// Sums over groups of rows, of which each block has made its own: the end of a gradient that all rows share.
#pragma once
#include "device.cuh"
#include "launch.h"

namespace igpt {
namespace cuda {

// A block takes 32 columns: its warps add every 32nd row, then each warp the 32 sums of a column, in one order always.
static __global__ void __launch_bounds__(1024) sum_groups_kernel(float* parts,  // [P, C], row 0 becomes the sum
                                                                 int64_t P, int64_t C) {
  STATIC_SMEM(float, sums, 32 * 33);  // a column further each row: no two lanes meet in a bank, either way
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t first = int64_t(blockIdx.x) * 32;
  float sum = 0.f;
  if (first + lane < C)
#pragma unroll 8
    for (int64_t p = warp; p < P; p += 32) sum += parts[p * C + first + lane];
  sums[warp * 33 + lane] = sum;
  __syncthreads();
  sum = warp_sum(sums[lane * 33 + warp]);
  if (lane == 0 && first + warp < C) parts[first + warp] = sum;
}

inline void sum_groups(const View& parts, Stream stream) {
  const int64_t P = parts.size[0], C = parts.cols();
  if (P < 2 || C == 0) return;
  LAUNCH(sum_groups_kernel, unsigned((C + 31) / 32), dim3(32, 32), 0, stream, parts.as<float>(), P, C);
}

}  // namespace cuda
}  // namespace igpt
