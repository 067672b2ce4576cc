// Built without a CUDA compiler: the CUDA backend is not here, and says so.
#include "../ops.h"

namespace igpt {

const Ops* cuda_ops() {
  return nullptr;
}
std::string cuda_why_not() {
  return "igpt_fast was built without nvcc; install a CUDA toolkit and reinstall";
}
std::string cuda_archs() {
  return "";
}
bool cuda_takes_ptx() {
  return false;
}
std::string cuda_versions() {
  return "";
}

}  // namespace igpt
