// Assumptions become checks: one macro, one sentence, one exception type that Python sees as ValueError.
#pragma once
#include <stdexcept>
#include <string>

#include "../ops.h"

#define IGPT_CHECK(condition, message)                                       \
  do {                                                                       \
    if (!(condition)) throw std::invalid_argument(std::string(message));     \
  } while (0)

namespace igpt {

static inline bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}

static inline bool is_float(DType t) { return t == DType::f32 || t == DType::bf16; }

}  // namespace igpt
