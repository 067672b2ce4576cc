// The CUDA backend's Ops, and whether this machine can run it.
//
// Whoever imports the package gets the table by the driver's version alone: to count devices would start CUDA, and a
// process that has started it can neither fork workers that use it nor choose its devices any more.
#include <cuda_runtime.h>

#include "../ops.h"

namespace igpt {
namespace cuda {

void fill_activation(Ops&);
void fill_color_histogram(Ops&);
void fill_cross_entropy(Ops&);
void fill_attention_bwd(Ops&);
void fill_attention_decode(Ops&);
void fill_attention_dropout_bwd(Ops&);
void fill_attention_dropout_fwd(Ops&);
void fill_attention_fwd(Ops&);
void fill_attention_prefix(Ops&);
void fill_cache_append(Ops&);
void fill_kmeans(Ops&);
void fill_linear(Ops&);
void fill_linear_cross_entropy(Ops&);
void fill_norm(Ops&);
void fill_palette(Ops&);
void fill_palette_decode(Ops&);
void fill_palette_table(Ops&);
void fill_sampling(Ops&);

static const Ops& table() {
  static const Ops t = [] {
    Ops ops;
    ops.name = "cuda";
    fill_activation(ops);
    fill_color_histogram(ops);
    fill_cross_entropy(ops);
    fill_attention_bwd(ops);
    fill_attention_decode(ops);
    fill_attention_dropout_bwd(ops);
    fill_attention_dropout_fwd(ops);
    fill_attention_fwd(ops);
    fill_attention_prefix(ops);
    fill_cache_append(ops);
    fill_kmeans(ops);
    fill_linear(ops);
    fill_linear_cross_entropy(ops);
    fill_norm(ops);
    fill_palette(ops);
    fill_palette_decode(ops);
    fill_palette_table(ops);
    fill_sampling(ops);
    return ops;
  }();
  return t;
}

}  // namespace cuda

std::string cuda_why_not() {
  int devices = 0, driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "no NVIDIA driver on this machine";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return std::string("no usable GPU: ") + cudaGetErrorString(error);
  return devices ? "" : "no GPU on this machine";
}

const Ops* cuda_ops() {
  int runtime = 0, driver = 0;
  const bool known = cudaRuntimeGetVersion(&runtime) == cudaSuccess && cudaDriverGetVersion(&driver) == cudaSuccess;
  return known && driver / 1000 >= runtime / 1000 ? &cuda::table() : nullptr;
}
std::string cuda_archs() {
  return IGPT_CUDA_ARCHS;
}
bool cuda_takes_ptx() {
  int driver = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= CUDART_VERSION;
}
std::string cuda_versions() {
  int runtime = 0, driver = 0;  // 13010 is 13.1; a driver that is not there is 0
  cudaRuntimeGetVersion(&runtime), cudaDriverGetVersion(&driver);
  const auto text = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  return text(runtime) + (driver ? ", the driver runs up to " + text(driver) : "");
}

}  // namespace igpt
