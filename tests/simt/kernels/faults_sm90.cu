// c [64, 64] = a [64, K] b [64, K]^T in bf16 as Hopper kernels do it: a producer thread brings tiles of 64 columns with
// TMA into three stages, a warpgroup multiplies them with wgmma, the result leaves by TMA. MUT == 0 is right, every
// other number has one mistake that the bench must catch; tests/simt/test_faults.py says which and how.
#include "device.cuh"
#include "entry.h"
#include "launch.h"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace igpt {
namespace cuda {
namespace {

constexpr int kTile = 64, kTileBytes = kTile * kTile * 2, kStages = 3, kMath = 128;

template <int MUT>
__global__ void __launch_bounds__(kMath + 128, 1)
    product_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                   const __grid_constant__ CUtensorMap c, int tiles) {
  DYN_SMEM_1024(unsigned char, s);  // stages of (a, b), then c as floats in two halves of 32 columns
  STATIC_SMEM(uint64_t, bars, 2 * kStages);
  const uint32_t base = ptx::smem_u32(s), full = ptx::smem_u32(bars), empty = full + 8 * kStages;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbar_init(full + 8 * i, 1);
      ptx::mbar_init(empty + 8 * i, MUT == 10 ? 5 : 4);
    }
    if (MUT != 11) ptx::mbar_fence_init();
  }
  if (MUT != 1) __syncthreads();
  if (t >= kMath) {
    ptx::reg_dealloc<40>();
    if (t != kMath) return;
    for (int j = 0; j < tiles; ++j) {
      const uint32_t stage = uint32_t(j % kStages), at = base + stage * 2 * kTileBytes, bar = full + 8 * stage;
      if (MUT != 2) ptx::mbar_wait(empty + 8 * stage, uint32_t(j / kStages) % 2 ^ 1u);
      ptx::mbar_arrive_expect_tx(bar, MUT == 4 ? kTileBytes : 2 * kTileBytes);
      ptx::tma_load(at, &a, bar, j * kTile, 0);
      ptx::tma_load(at + kTileBytes, &b, bar, j * kTile, 0);
    }
    return;
  }
  ptx::reg_alloc<232>();
  float acc[32];
  for (int j = 0; j < tiles; ++j) {
    const uint32_t stage = uint32_t(j % kStages), at = base + stage * 2 * kTileBytes, phase = uint32_t(j / kStages) % 2;
    ptx::mbar_wait(full + 8 * stage, MUT == 3 ? phase ^ 1u : phase);
    const auto swizzle = MUT == 5 ? ptx::Swizzle::b64 : ptx::Swizzle::b128;
    const uint64_t da = ptx::matrix_descriptor(at, 16, MUT == 12 ? 512 : 1024, ptx::Swizzle::b128);
    const uint64_t db = ptx::matrix_descriptor(at + kTileBytes, 16, 1024, swizzle);
    if (MUT != 6) ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k)  // sixteen columns are 32 bytes: two units of the descriptor's address
      ptx::wgmma<64, __nv_bfloat16>(acc, da + 2 * k, db + 2 * k, j > 0 || k > 0);
    if (MUT != 9) ptx::wgmma_commit();
    if (MUT == 7 && lane == 0) ptx::mbar_arrive(empty + 8 * stage);
    if (MUT != 8) ptx::wgmma_wait<0>();
    if (MUT != 7 && lane == 0) ptx::mbar_arrive(empty + 8 * stage);
  }
  float* out = reinterpret_cast<float*>(s + kStages * 2 * kTileBytes);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[(col / 32 * kTile + row) * 32 + col % 32] = acc[i];
  }
  if (MUT != 13) ptx::fence_proxy_async();
  ptx::bar_sync(1, kMath);
  if (t == 0) {
    for (int half = 0; half < 2; ++half)
      ptx::tma_store(&c, base + kStages * 2 * kTileBytes + half * 8192, 32 * half, 0);
    if (MUT != 14) ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

template <int MUT>
void launch_product(const simt_test::Arguments& a) {
  const uint64_t k = uint64_t(a.number(0));
  const uint64_t size[2] = {k, kTile}, stride[1] = {k}, out_size[2] = {kTile, kTile}, out_stride[1] = {kTile};
  const uint32_t box[2] = {kTile, kTile}, out_box[2] = {32, kTile};
  const auto map = [&](int i) {
    return tensor_map<2>(a.at<void>(i), DType::bf16, size, stride, box, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  const CUtensorMap c =
      tensor_map<2>(a.at<void>(2), DType::f32, out_size, out_stride, out_box, CU_TENSOR_MAP_SWIZZLE_NONE);
  const size_t bytes = kStages * 2 * kTileBytes + 2 * 8192;
  if (MUT != 15) allow_shared(product_kernel<MUT>, bytes);
  LAUNCH(product_kernel<MUT>, 1, kMath + 128, bytes, Stream(), map(0), map(1), c, int((k + kTile - 1) / kTile));
}

template <int... MUT>
void choose(const simt_test::Arguments& a, std::integer_sequence<int, MUT...>) {
  ((a.number(1) == MUT ? launch_product<MUT>(a) : void()), ...);
}

}  // namespace

TEST_KERNEL(product) {
  choose(a, std::make_integer_sequence<int, 16>());
}

}  // namespace cuda
}  // namespace igpt
