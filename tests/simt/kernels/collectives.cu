// Warp and block collectives, atomics and 16-bit floats, each lane writing what it got. tests/simt/test_collectives.py
// has the formulas.
#include "device.cuh"
#include "entry.h"
#include "launch.h"

namespace igpt {
namespace cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// out [7, 64]: two warps
__global__ void shuffles_kernel(const int* x, int* out, int argument, int width) {
  const int t = threadIdx.x, v = x[t];
  out[t] = __shfl_sync(kAll, v, argument, width);
  out[64 + t] = __shfl_xor_sync(kAll, v, argument, width);
  out[128 + t] = __shfl_down_sync(kAll, v, argument, width);
  out[192 + t] = __shfl_up_sync(kAll, v, argument, width);
  out[256 + t] = int(__shfl_xor_sync(kAll, double(v), 1));
  // Two halves of a warp, each with a mask of its own.
  if (t % 32 < 16)
    out[320 + t] = __shfl_xor_sync(0x0000ffffu, v, 3);
  else
    out[320 + t] = __shfl_down_sync(0xffff0000u, v, 2, 16);
  out[384 + t] = int(float(__shfl_xor_sync(kAll, __nv_bfloat16(float(v)), 2)));
}

// out [11, 64]
__global__ void votes_kernel(const int* x, unsigned* out) {
  const int t = threadIdx.x, v = x[t];
  int same = 0;
  out[t] = __ballot_sync(kAll, v > 3);
  out[64 + t] = __any_sync(kAll, v == 5) + 2 * __all_sync(kAll, v < 8);
  out[128 + t] = __match_any_sync(kAll, v);
  out[192 + t] = __match_all_sync(kAll, v / 8, &same) ^ unsigned(same);
  out[256 + t] = __reduce_add_sync(kAll, v - 4);
  out[320 + t] = __reduce_min_sync(kAll, v - 4);
  out[384 + t] = __reduce_max_sync(kAll, unsigned(v));
  out[448 + t] = __reduce_or_sync(kAll, 1u << v) ^ __reduce_and_sync(kAll, unsigned(v) | 32u);
  out[512 + t] = __reduce_xor_sync(kAll, unsigned(v));
  out[576 + t] = unsigned(__syncthreads_count(v > 3));
  out[640 + t] = unsigned(__syncthreads_or(v == 5) + 2 * __syncthreads_and(v < 8));
}

// ints [8], floats [1], longs [1]; many blocks
__global__ void atomics_kernel(int* ints, float* floats, unsigned long long* longs) {
  STATIC_SMEM(int, total, 1);
  const int t = threadIdx.x, id = blockIdx.x * blockDim.x + t;
  if (t == 0) total[0] = 0;
  __syncthreads();
  atomicAdd(total, t);
  __syncthreads();
  if (t == 0) atomicAdd(&ints[0], total[0]);
  atomicMax(&ints[1], id);
  atomicMin(&ints[2], -id);
  atomicOr(&ints[3], 1 << (id % 31));
  atomicAdd(reinterpret_cast<unsigned*>(&ints[4]), 2u);
  if (atomicCAS(&ints[5], 0, id + 1) == 0) atomicAdd(&ints[6], 1);
  if (id == 77) atomicExch(&ints[7], id);
  atomicAdd(floats, 0.5f);
  atomicAdd(longs, 1ull << 33);
}

// pairs of floats → a b, a + b, a / b, fma(a, b, a) in 16 bits, as floats; out [6, n]
template <class E>
__global__ void arithmetic_kernel(const float* a, const float* b, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const E x(a[i]), y(b[i]);
  out[i] = float(x);
  out[n + i] = float(x * y);
  out[2 * n + i] = float(x + y);
  out[3 * n + i] = float(__hfma(x, y, x));
  out[4 * n + i] = float(__hmax(x, y));
  E sum = x;
  sum += y;
  out[5 * n + i] = float(sum);
}

}  // namespace

TEST_KERNEL(shuffles) {
  LAUNCH(shuffles_kernel, 1, 64, 0, Stream(), a.at<int>(0), a.at<int>(1), a.number(0), a.number(1));
}
TEST_KERNEL(votes) {
  LAUNCH(votes_kernel, 1, 64, 0, Stream(), a.at<int>(0), a.at<unsigned>(1));
}
TEST_KERNEL(atomics) {
  LAUNCH(atomics_kernel, a.number(0), 64, 0, Stream(), a.at<int>(0), a.at<float>(1), a.at<unsigned long long>(2));
}
TEST_KERNEL(arithmetic) {
  const int n = a.number(0);
  const auto kernel = a.number(1) ? arithmetic_kernel<__nv_bfloat16> : arithmetic_kernel<__half>;
  LAUNCH(kernel, (n + 63) / 64, 64, 0, Stream(), a.at<float>(0), a.at<float>(1), a.at<float>(2), n);
}

}  // namespace cuda
}  // namespace igpt
