// Kernels with planted faults: MUT == 0 is right, every other number has one mistake that the bench must catch.
// tests/simt/test_faults.py says which and how.
#include "device.cuh"
#include "entry.h"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {
namespace {

constexpr int kRow = 64, kRounds = 4;

// out [n] = in [n] reversed within rows of 64, plus the sum of the row's second half. A block takes up to four rows.
template <int MUT>
__global__ void tile_kernel(const float* in, float* out, int n) {
  DYN_SMEM(float, s);  // [64]
  STATIC_SMEM(float, sum, 1);
  const int t = threadIdx.x;
  for (int round = 0; round < kRounds; ++round) {
    const int row = (int(blockIdx.x) * kRounds + round) * kRow;
    if (row >= n) return;
    if (MUT == 3 ? row + t <= n : row + t < n) s[t] = in[MUT == 3 ? row + t + 1 : row + t];
    if (MUT == 4 && t == kRow - 1) s[t + 1] = 0.f;
    if (MUT != 5 && t == 0) sum[0] = 0.f;
    if (MUT != 1 && !(MUT == 6 && t / 32 == 1 && round == 1)) __syncthreads();
    if (t < 32) {
      float x = s[kRow - 1 - t];
      for (int offset = 16; offset; offset /= 2)
        if (MUT != 7 || t < 16) x += __shfl_xor_sync(0xffffffffu, x, offset);
      if (t == 0) sum[0] += x;
      if (MUT == 8 && t == 1) (&sum[0])[1] = x;
    }
    if (MUT != 9) __syncthreads();
    out[row + t] = s[kRow - 1 - t] + sum[0];
    if (MUT != 2) __syncthreads();
  }
}

// Each lane hands its value to the lane across the warp through shared memory.
template <int MUT>
__global__ void lanes_kernel(const float* in, float* out, int n) {
  STATIC_SMEM(float, s, 32);
  const int t = threadIdx.x;
  for (int i = 0; i < n; i += 32) {
    s[t] = in[i + t];
    if (MUT != 1) __syncwarp();
    float mine[2] = {s[31 - t], 0.f};
    if (MUT == 2 && t % 4 == 0) mine[0] = reinterpret_cast<const float4*>(&s[28 - t] + (i ? 1 : 0))->w;
    if (MUT == 3) mine[n / 64] = 0.f;  // n is 128
    out[i + t] = mine[0];
    __syncwarp();
  }
}

constexpr int kStage = 512, kStageThreads = 128;

template <int MUT>
__device__ inline void load_stage(float* stage, const float* in, int begin, int n) {
  const int i = begin + 4 * int(threadIdx.x), left = n - i;
  const int given = MUT == 5 ? 16 : left >= 4 ? 16 : left > 0 ? 4 * left : 0;
  ptx::cp_async<16>(ptx::smem_u32(stage + 4 * threadIdx.x), in + (given ? i : 0), given);
}

// out [n] = in [n] reversed within stages of 512 (zeros stand for what is past n), two stages in flight.
template <int MUT>
__global__ void stages_kernel(const float* in, float* out, int n) {
  DYN_SMEM(float, s);  // [2, 512]
  const int stages = (n + kStage - 1) / kStage, t = threadIdx.x;
  load_stage<MUT>(s, in, 0, n);
  ptx::cp_async_commit();
  for (int j = 0; j < stages; ++j) {
    const float* stage = s + j % 2 * kStage;
    if (j + 1 < stages) load_stage<MUT>(s + (j + 1) % 2 * kStage, in, (j + 1) * kStage, n);
    if (MUT != 3) ptx::cp_async_commit();
    ptx::cp_async_wait<MUT == 1 ? 2 : 1>();
    if (MUT != 2) __syncthreads();
    for (int i = t; i < kStage; i += kStageThreads)
      if (j * kStage + i < n) out[j * kStage + i] = stage[kStage - 1 - i];
    if (MUT != 4) __syncthreads();
  }
  ptx::cp_async_wait<0>();
  if (MUT == 6) load_stage<0>(s, in, 0, n);
}

// d [16, 8] = a [16, 16] b [8, 16]^T in bf16 through swizzled shared memory and ldmatrix: chunk c of row r at c ^ (r /
// 4 % 2)
template <int MUT>
__global__ void fragments_kernel(const uint4* a, const uint4* b, float* d) {
  STATIC_SMEM(uint4, s, 48);
  const int t = threadIdx.x, row = t / 2, chunk = t % 2;
  s[2 * row + (chunk ^ (row / 4 % 2))] = a[t];
  if (t < 16) s[32 + 2 * row + (chunk ^ (row / 4 % 2))] = b[t];
  __syncwarp();
  const auto at = [&](int r, int c) { return ptx::smem_u32(&s[2 * r + (c ^ (MUT == 1 ? r / 2 % 2 : r / 4 % 2))]); };
  uint32_t fa[4], fb[2];
  ptx::ldmatrix(fa, at(t % 16, t / 16));
  ptx::ldmatrix(fb, at(16 + t % 8, t / 8 % 2));
  float acc[4] = {};
  ptx::mma_m16n8k16<__nv_bfloat16>(acc, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) d[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = acc[i];
}

// Two pairs of warps exchange through two named barriers.
template <int MUT>
__global__ void pairs_kernel(const float* in, float* out) {
  STATIC_SMEM(float, s, 128);
  const int t = threadIdx.x, pair = t / 64;
  s[t] = in[t];
  if (MUT == 1)
    ptx::bar_sync(1 + t / 32, 64);  // each warp at a barrier of its own
  else if (MUT == 2)
    ptx::bar_sync(1 + pair, t % 64 < 32 ? 64 : 128);
  else
    ptx::bar_sync(1 + pair, 64);
  out[t] = s[pair * 64 + 63 - t % 64];
}

template <class F>
void choose(int fault, F launch) {
  switch (fault) {
    case 0:
      return launch(std::integral_constant<int, 0>());
    case 1:
      return launch(std::integral_constant<int, 1>());
    case 2:
      return launch(std::integral_constant<int, 2>());
    case 3:
      return launch(std::integral_constant<int, 3>());
    case 4:
      return launch(std::integral_constant<int, 4>());
    case 5:
      return launch(std::integral_constant<int, 5>());
    case 6:
      return launch(std::integral_constant<int, 6>());
    case 7:
      return launch(std::integral_constant<int, 7>());
    case 8:
      return launch(std::integral_constant<int, 8>());
    default:
      return launch(std::integral_constant<int, 9>());
  }
}

}  // namespace

TEST_KERNEL(tile) {
  const int n = a.number(0), blocks = (n + kRow * kRounds - 1) / (kRow * kRounds);
  choose(a.number(1), [&](auto mut) {
    LAUNCH(tile_kernel<decltype(mut)::value>, blocks, kRow, kRow * sizeof(float), Stream(), a.at<float>(0),
           a.at<float>(1), n);
  });
}
TEST_KERNEL(lanes) {
  choose(a.number(1), [&](auto mut) {
    LAUNCH(lanes_kernel<decltype(mut)::value>, 1, 32, 0, Stream(), a.at<float>(0), a.at<float>(1), a.number(0));
  });
}
TEST_KERNEL(stages) {
  choose(a.number(1), [&](auto mut) {
    LAUNCH(stages_kernel<decltype(mut)::value>, 1, kStageThreads, 2 * kStage * sizeof(float), Stream(), a.at<float>(0),
           a.at<float>(1), a.number(0));
  });
}
TEST_KERNEL(fragments) {
  choose(a.number(0), [&](auto mut) {
    LAUNCH(fragments_kernel<decltype(mut)::value>, 1, 32, 0, Stream(), a.at<uint4>(0), a.at<uint4>(1), a.at<float>(2));
  });
}
TEST_KERNEL(pairs) {
  choose(a.number(0), [&](auto mut) {
    LAUNCH(pairs_kernel<decltype(mut)::value>, 1, 128, 0, Stream(), a.at<float>(0), a.at<float>(1));
  });
}

}  // namespace cuda
}  // namespace igpt
