// Host side of a launch: the one way to start a kernel, and the one way to see that it started.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../ops.h"

namespace igpt {
namespace cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would find this error, and raise it as its own
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline cudaStream_t stream_of(Stream stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

// Whether rows of C elements can be read in vectors of 16 bytes: torch's allocations are aligned, slices may not be.
inline bool in_sixteens(DType dtype, int64_t C, std::initializer_list<View> views) {
  bool ok = C % (dtype == DType::f32 ? 4 : 8) == 0;
  for (const View& v : views) ok = ok && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  return ok;
}

// Calls f.template operator()<T, V>() with the element type of `dtype` and V of them: 16 bytes, or one.
template <class F>
void by_type(DType dtype, bool wide, F f) {
  if (dtype == DType::f32) return wide ? f.template operator()<float, 4>() : f.template operator()<float, 1>();
  if (dtype == DType::bf16)
    return wide ? f.template operator()<__nv_bfloat16, 8>() : f.template operator()<__nv_bfloat16, 1>();
  return wide ? f.template operator()<__half, 8>() : f.template operator()<__half, 1>();
}

// Makes the device of a tensor current for the life of the object. Where it is that already nothing is set: setting a
// device makes a context on it.
class OnDevice {
 public:
  explicit OnDevice(const View& v) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (v.device == before_) return;
    check_cuda(cudaSetDevice(v.device), "cudaSetDevice");
    switched_ = true;
  }
  ~OnDevice() {
    if (switched_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
// 8 for Ampere and Ada, 9 for Hopper, whose files end in _sm90.cu.
inline int compute_capability() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor);
}

// Lets a kernel have more than the 48 KB of dynamic shared memory that every kernel may.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
             "cudaFuncSetAttribute (shared memory)");
}

}  // namespace cuda
}  // namespace igpt

// LAUNCH(kernel, blocks, threads, bytes of dynamic shared memory, stream, arguments...)
// LAUNCH_CLUSTER(kernel, blocks, threads, blocks of a cluster, bytes, stream, arguments...)
#if !defined(IGPT_SIMT)  // the bench brings its own two
#define LAUNCH(kernel, blocks, threads, shared, stream, ...)                                 \
  do {                                                                                       \
    kernel<<<(blocks), (threads), (shared), ::igpt::cuda::stream_of(stream)>>>(__VA_ARGS__); \
    ::igpt::cuda::check_cuda(cudaGetLastError(), #kernel);                                   \
  } while (0)
#define LAUNCH_CLUSTER(kernel, blocks, threads, cluster, shared, on, ...)                      \
  do {                                                                                         \
    const dim3 igpt_cluster(cluster);                                                          \
    cudaLaunchAttribute igpt_attribute{};                                                      \
    igpt_attribute.id = cudaLaunchAttributeClusterDimension;                                   \
    igpt_attribute.val.clusterDim.x = igpt_cluster.x;                                          \
    igpt_attribute.val.clusterDim.y = igpt_cluster.y;                                          \
    igpt_attribute.val.clusterDim.z = igpt_cluster.z;                                          \
    cudaLaunchConfig_t igpt_config{};                                                          \
    igpt_config.gridDim = dim3(blocks), igpt_config.blockDim = dim3(threads);                  \
    igpt_config.dynamicSmemBytes = (shared), igpt_config.stream = ::igpt::cuda::stream_of(on); \
    igpt_config.attrs = &igpt_attribute, igpt_config.numAttrs = 1;                             \
    ::igpt::cuda::check_cuda(cudaLaunchKernelEx(&igpt_config, kernel, __VA_ARGS__), #kernel);  \
  } while (0)
#endif
