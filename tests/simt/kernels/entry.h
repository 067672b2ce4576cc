// A test kernel's launcher: buffers and numbers come from Python (or from a GPU's own driver) as plain arrays.
#pragma once
#include <cstdint>

namespace simt_test {

struct Arguments {
  void* const* buffers;
  const int64_t* numbers;
  template <class T>
  T* at(int i) const {
    return static_cast<T*>(buffers[i]);
  }
  int number(int i) const { return int(numbers[i]); }
};

}  // namespace simt_test

#define TEST_KERNEL(name) \
  extern "C" __attribute__((visibility("default"))) void test_##name(const simt_test::Arguments& a)
