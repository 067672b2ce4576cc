// Where refusals are worded: compiled once, for the baseline.
#include "check.h"

#include <cstdarg>
#include <cstdio>

namespace igpt {

void refuse(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw std::invalid_argument(text);
}

}  // namespace igpt
