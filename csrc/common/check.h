// Assumptions become checks: one macro, one sentence, one exception type that Python sees as ValueError.
#pragma once
#include "../ops.h"

namespace igpt {

// Throws std::invalid_argument with a printf-style message. Lives in check.cpp: building a std::string here would leave
// copies of the library's functions in code for one instruction set, and the linker keeps one copy for all.
[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

static inline bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim || !a.data != !b.data) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}

static inline bool is_float(DType t) {
  return t == DType::f32 || t == DType::bf16;
}

// The dtypes of the CUDA kernels.
static inline bool is_gpu_float(DType t) {
  return is_float(t) || t == DType::f16;
}

}  // namespace igpt

#define IGPT_CHECK(condition, ...)                 \
  do {                                             \
    if (!(condition)) ::igpt::refuse(__VA_ARGS__); \
  } while (0)
