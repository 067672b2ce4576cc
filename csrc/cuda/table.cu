// The CUDA backend's Ops, and whether this machine can run it.
#include <cuda_runtime.h>

#include "../ops.h"

namespace igpt {
namespace cuda {

void fill_activation(Ops&);
void fill_cross_entropy(Ops&);
void fill_attention_bwd(Ops&);
void fill_attention_fwd(Ops&);
void fill_linear_cross_entropy(Ops&);
void fill_norm(Ops&);
void fill_palette(Ops&);
void fill_sampling(Ops&);

static const Ops& table() {
  static const Ops t = [] {
    Ops ops;
    ops.name = "cuda";
    fill_activation(ops);
    fill_cross_entropy(ops);
    fill_attention_bwd(ops);
    fill_attention_fwd(ops);
    fill_linear_cross_entropy(ops);
    fill_norm(ops);
    fill_palette(ops);
    fill_sampling(ops);
    return ops;
  }();
  return t;
}

}  // namespace cuda

std::string cuda_why_not() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return std::string("no usable GPU: ") + cudaGetErrorString(error);
  return devices ? "" : "no GPU on this machine";
}

const Ops* cuda_ops() {
  return cuda_why_not().empty() ? &cuda::table() : nullptr;
}
std::string cuda_archs() {
  return IGPT_CUDA_ARCHS;
}

}  // namespace igpt
