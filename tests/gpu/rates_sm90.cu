// How fast Hopper's tensor cores are with operands where attention has them, and its exp2: cycles of a multiprocessor
// for each instruction, when 1 to 4 warpgroups ask for it without pause. A JSON object on standard output.
//
// What PLAN.md says of attention rests on these: 32 cycles for m64n64k16 by the data sheet, 8 for a warp's exp2.
#include <cuda_bf16.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.cuh"
#include "launch.h"
#include "ptx_sm90.cuh"

namespace {

using namespace igpt::cuda;
using T = __nv_bfloat16;

constexpr int kSteps = 4, kRepeats = 8;  // along K: 64 elements, eight times between two waits

struct Took {
  long long cycles, nanoseconds;
};

__device__ long long nanoseconds() {
  long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// `work` by all warpgroups of the block, `rounds` times; what it took as its first thread saw it.
template <class Work>
__device__ void timed(Took* took, int rounds, Work work) {
  work();
  __syncthreads();
  const long long from = nanoseconds(), begin = clock64();
  for (int r = 0; r < rounds; ++r) work();
  __syncthreads();
  if (threadIdx.x == 0) took[blockIdx.x] = {clock64() - begin, nanoseconds() - from};
}

// Tiles of 64 rows and 64 columns with the swizzle of 128 bytes, zeros: of B [N, 64], or with B_MN of its transpose.
template <int N, bool registers, int B_MN, int groups>
__global__ void __launch_bounds__(128 * groups, 1) wgmma_rate(Took* took, int rounds, float* out) {
  DYN_SMEM_1024(uint4, shared);
  for (int i = threadIdx.x; i < (8192 * groups + N * 128) / 16; i += blockDim.x) shared[i] = {};
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t a = ptx::smem_u32(shared) + threadIdx.x / 128 * 8192, b = ptx::smem_u32(shared) + 8192 * groups;
  const uint64_t x = ptx::matrix_descriptor(a, 16, 1024, ptx::Swizzle::b128);
  const uint64_t y = ptx::matrix_descriptor(b, B_MN ? 8192 : 16, 1024, ptx::Swizzle::b128);
  uint32_t fragment[kSteps][4];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) ptx::ldmatrix(fragment[k], a + threadIdx.x % 32 * 16 + k * 512);
  float sums[N / 2] = {};
  timed(took, rounds, [&] {
    ptx::hold_registers(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kRepeats * kSteps; ++i) {
      const int k = i % kSteps;
      if constexpr (registers)
        ptx::wgmma<N, T, B_MN>(sums, fragment[k], y + (B_MN ? k * 128 : k * 2), 1);
      else
        ptx::wgmma<N, T, 0, B_MN>(sums, x + k * 2, y + (B_MN ? k * 128 : k * 2), 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold_registers(sums);
  });
#pragma unroll
  for (float s : sums)
    if (s != 0.f) *out = s;
}

template <int groups>
__global__ void __launch_bounds__(128 * groups, 1) exp2_rate(Took* took, int rounds, float* out) {
  float x[32];
#pragma unroll
  for (float& v : x) v = float(threadIdx.x);
  timed(took, rounds, [&] {
#pragma unroll
    for (float& v : x) v = ptx::ex2(v);
  });
#pragma unroll
  for (float v : x)
    if (v == 1.5f) *out = v;
}

int blocks() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Runs it on all multiprocessors; prints cycles for each of `each` instructions a warpgroup and round, and the clock.
template <class Kernel>
void report(const std::string& name, Kernel kernel, int groups, size_t shared, int rounds, int each) {
  static const char* comma = "";
  Took* took = nullptr;
  check_cuda(cudaMalloc(&took, sizeof(Took) * size_t(blocks()) + sizeof(float)), "cudaMalloc");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name.c_str());
  kernel<<<blocks(), 128 * groups, shared>>>(took, rounds, reinterpret_cast<float*>(took + blocks()));
  check_cuda(cudaGetLastError(), name.c_str());
  std::vector<Took> found(size_t(blocks()), Took{});
  check_cuda(cudaMemcpy(found.data(), took, sizeof(Took) * found.size(), cudaMemcpyDeviceToHost), name.c_str());
  check_cuda(cudaFree(took), "cudaFree");
  double cycles = 0, megahertz = 0;
  for (const Took& t : found) {
    cycles += double(t.cycles) / double(found.size());
    megahertz += 1e3 * double(t.cycles) / double(t.nanoseconds) / double(found.size());
  }
  std::printf("%s\n  \"%s, %d warpgroups\": {\"cycles\": %.2f, \"mhz\": %.0f}", comma, name.c_str(), groups,
              cycles / (double(rounds) * each * groups), megahertz);
  comma = ",";
}

template <int N, bool registers, int B_MN, int groups>
void wgmma() {
  report("m64n" + std::to_string(N) + "k16, A in " + (registers ? "registers" : "shared memory") +
             (B_MN ? ", B along its rows" : ""),
         wgmma_rate<N, registers, B_MN, groups>, groups, 8192 * groups + N * 128, 20000, kRepeats * kSteps);
}

template <int N>
void all_wgmma() {
  wgmma<N, false, 0, 1>(), wgmma<N, false, 0, 2>(), wgmma<N, true, 0, 1>(), wgmma<N, true, 0, 2>();
  wgmma<N, true, 1, 2>();
  if constexpr (N <= 128) wgmma<N, false, 0, 3>(), wgmma<N, true, 0, 3>();
  if constexpr (N == 64) wgmma<N, false, 0, 4>(), wgmma<N, true, 0, 4>();
}

}  // namespace

int main() {
  try {
    std::printf("{");
    all_wgmma<64>(), all_wgmma<128>(), all_wgmma<256>();
    report("exp2 of a warpgroup", exp2_rate<1>, 1, 0, 20000, 32);
    report("exp2 of a warpgroup", exp2_rate<4>, 4, 0, 20000, 32);
    std::printf("\n}\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rates: %s\n", e.what());
    return 1;
  }
}
