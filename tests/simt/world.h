// Where drive.cpp's kernels run: memory and waiting, on the bench or on a GPU.
#pragma once
#include <cstddef>
#include <cstring>

#if defined(IGPT_SIMT)
#include "cuda_runtime.h"
#include "runtime.h"

namespace world {

constexpr int kDevice = -1, kRuns = 4, kKinds = 2;
inline void kind(int i) {  // launchers that choose by the GPU's compute capability do so for 8, then for 9
  simt::capability = 8 + i;
}
inline void* allocate(size_t bytes) {
  return simt::guarded_alloc(bytes, 0);
}
inline void release(void* p) {
  simt::guarded_free(p);
}
inline void copy_in(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
inline void copy_out(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
inline void synchronize() {}
inline void schedule(int run) {
  constexpr simt::Config schedules[kRuns] = {{simt::kInOrder, 1, simt::kLate, 1},
                                             {simt::kRandom, 5, simt::kLate, 1},
                                             {simt::kRandom, 6, simt::kAtOnce, 2},
                                             {simt::kReverse, 1, simt::kLate, 1}};
  simt::config() = schedules[run];
}

}  // namespace world
#else
#include "launch.h"

namespace world {

using igpt::cuda::check_cuda;
constexpr int kDevice = 0, kRuns = 2, kKinds = 1;
inline void kind(int) {}
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  check_cuda(cudaMalloc(&p, bytes ? bytes : 1), "cudaMalloc");
  return p;
}
inline void release(void* p) {
  cudaFree(p);
}
inline void copy_in(void* to, const void* from, size_t bytes) {
  check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "to the GPU");
}
inline void copy_out(void* to, const void* from, size_t bytes) {
  check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "from the GPU");
}
inline void synchronize() {
  check_cuda(cudaDeviceSynchronize(), "the kernel");
}
inline void schedule(int) {}

}  // namespace world
#endif
