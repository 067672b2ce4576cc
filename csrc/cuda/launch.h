// Host side of a launch: the one way to start a kernel, and the one way to see that it started.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ops.h"

namespace igpt {
namespace cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline cudaStream_t stream_of(Stream stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

// Makes the device of a tensor current for the life of the object.
class OnDevice {
 public:
  explicit OnDevice(const View& v) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (v.device != before_) check_cuda(cudaSetDevice(v.device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace cuda
}  // namespace igpt

// LAUNCH(kernel, blocks, threads, bytes of dynamic shared memory, stream, arguments...)
#define LAUNCH(kernel, blocks, threads, shared, stream, ...)                                 \
  do {                                                                                       \
    kernel<<<(blocks), (threads), (shared), ::igpt::cuda::stream_of(stream)>>>(__VA_ARGS__); \
    ::igpt::cuda::check_cuda(cudaGetLastError(), #kernel);                                   \
  } while (0)
