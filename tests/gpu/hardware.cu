// The bench's test kernels on the GPU: the same C interface as tests/simt/control.cpp, compiled by nvcc. Buffers are
// copied to allocations of their exact size, so that compute-sanitizer sees a step beside them.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <vector>

#include "entry.h"
#include "launch.h"

using igpt::cuda::check_cuda;

extern "C" __attribute__((visibility("default"))) int gpu_call(void (*launcher)(const simt_test::Arguments&), int count,
                                                               void** buffers, const size_t* bytes,
                                                               const int64_t* numbers, char* error,
                                                               size_t error_bytes) {
  std::vector<void*> ours(size_t(count), nullptr);
  int failed = 0;
  try {
    for (int i = 0; i < count; ++i) {
      check_cuda(cudaMalloc(&ours[size_t(i)], bytes[i] ? bytes[i] : 1), "cudaMalloc");
      check_cuda(cudaMemcpy(ours[size_t(i)], buffers[i], bytes[i], cudaMemcpyHostToDevice), "to the GPU");
    }
    launcher({ours.data(), numbers});
    check_cuda(cudaDeviceSynchronize(), "the kernel");
    for (int i = 0; i < count; ++i)
      check_cuda(cudaMemcpy(buffers[i], ours[size_t(i)], bytes[i], cudaMemcpyDeviceToHost), "from the GPU");
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    failed = 1;
  }
  for (void* p : ours) cudaFree(p);
  return failed;
}
