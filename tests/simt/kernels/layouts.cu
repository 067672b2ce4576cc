// The wrappers of ptx.cuh, each alone: what goes in and out is raw, the formulas are in tests/simt/test_layouts.py.
#include "device.cuh"
#include "entry.h"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {
namespace {

// rows [8 N, 8] of 16 bits, row i stored at byte 48 i (16-byte aligned, no power of two) → out [32, N]
template <int N, bool TRANS>
__global__ void ldmatrix_kernel(const uint4* rows, uint32_t* out) {
  DYN_SMEM(unsigned char, s);
  const int lane = threadIdx.x;
  if (lane < 8 * N) *reinterpret_cast<uint4*>(s + 48 * lane) = rows[lane];
  __syncwarp();
  uint32_t r[N];
  const uint32_t at = ptx::smem_u32(s + 48 * (lane < 8 * N ? lane : 0));
  if constexpr (TRANS)
    ptx::ldmatrix_trans(r, at);
  else
    ptx::ldmatrix(r, at);
  for (int i = 0; i < N; ++i) out[lane * N + i] = r[i];
}

// fragments a [32, 4], b [32, 2], d [32, 4] → d
template <class E>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  const uint32_t x[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  float y[4] = {d[4 * lane], d[4 * lane + 1], d[4 * lane + 2], d[4 * lane + 3]};
  ptx::mma_m16n8k16<E>(y, x, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = y[i];
}

// Each of 32 threads copies BYTES, of which given[t] exist; two groups, the second waited for last. out: 2 x 32 x BYTES
template <int BYTES>
__global__ void cp_async_kernel(const unsigned char* from, const int* given, unsigned char* out) {
  DYN_SMEM(unsigned char, s);
  const int t = threadIdx.x;
  for (int g = 0; g < 2; ++g) {
    ptx::cp_async<BYTES>(ptx::smem_u32(s + (32 * g + t) * BYTES), from + (32 * g + t) * BYTES, given[t]);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  for (int i = 0; i < BYTES; ++i) out[t * BYTES + i] = s[t * BYTES + i];
  ptx::cp_async_wait<0>();
  for (int i = 0; i < BYTES; ++i) out[(32 + t) * BYTES + i] = s[(32 + t) * BYTES + i];
}

// Warps 0 and 1 produce for warps 2 and 3 through one slot each and two named barriers a pair. out [rounds, 2, 32]
__global__ void named_barriers_kernel(const int* x, int* out, int rounds) {
  STATIC_SMEM(int, slots, 64);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = warp % 2;
  for (int r = 0; r < rounds; ++r)
    if (warp < 2) {
      if (r > 0) ptx::bar_sync(1 + pair, 64);  // empty
      slots[32 * pair + lane] = x[(2 * r + pair) * 32 + lane];
      ptx::bar_arrive(3 + pair, 64);  // full
    } else {
      ptx::bar_sync(3 + pair, 64);
      out[(2 * r + pair) * 32 + lane] = slots[32 * pair + 31 - lane];
      if (r + 1 < rounds) ptx::bar_arrive(1 + pair, 64);
    }
}

// x [n] → ex2 [n], pairs as bf16x2 [n / 2], as f16x2 [n / 2]
__global__ void scalars_kernel(const float* x, float* powers, uint32_t* bf16, uint32_t* f16, int n) {
  const int i = threadIdx.x;
  if (i < n) powers[i] = ptx::ex2(x[i]);
  if (i < n / 2) {
    bf16[i] = ptx::pack2<__nv_bfloat16>(x[2 * i], x[2 * i + 1]);
    f16[i] = ptx::pack2<__half>(x[2 * i], x[2 * i + 1]);
  }
}

}  // namespace

TEST_KERNEL(ldmatrix) {
  const bool trans = a.number(1);
  const auto one = trans ? ldmatrix_kernel<1, true> : ldmatrix_kernel<1, false>;
  const auto two = trans ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>;
  const auto four = trans ? ldmatrix_kernel<4, true> : ldmatrix_kernel<4, false>;
  const auto kernel = a.number(0) == 1 ? one : a.number(0) == 2 ? two : four;
  LAUNCH(kernel, 1, 32, 48 * 32, Stream(), a.at<uint4>(0), a.at<uint32_t>(1));
}
TEST_KERNEL(mma) {
  const auto kernel = a.number(0) ? mma_kernel<__nv_bfloat16> : mma_kernel<__half>;
  LAUNCH(kernel, 1, 32, 0, Stream(), a.at<uint32_t>(0), a.at<uint32_t>(1), a.at<float>(2));
}
TEST_KERNEL(cp_async) {
  const int bytes = a.number(0);
  const auto kernel = bytes == 4 ? cp_async_kernel<4> : bytes == 8 ? cp_async_kernel<8> : cp_async_kernel<16>;
  LAUNCH(kernel, 1, 32, 64 * bytes, Stream(), a.at<unsigned char>(0), a.at<int>(1), a.at<unsigned char>(2));
}
TEST_KERNEL(named_barriers) {
  LAUNCH(named_barriers_kernel, 1, 128, 0, Stream(), a.at<int>(0), a.at<int>(1), a.number(0));
}
TEST_KERNEL(scalars) {
  LAUNCH(scalars_kernel, 1, 256, 0, Stream(), a.at<float>(0), a.at<float>(1), a.at<uint32_t>(2), a.at<uint32_t>(3),
         a.number(0));
}

}  // namespace cuda
}  // namespace igpt
