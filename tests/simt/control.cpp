// The bench's C interface, the same in _simt and in kernels: schedules, and calling a test kernel with errors as text.
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "cuda_runtime.h"
#include "kernels/entry.h"
#include "runtime.h"

#define SIMT_API extern "C" __attribute__((visibility("default")))

SIMT_API void simt_configure(int schedule, uint64_t seed, int landing, int workers) {
  simt::config() = {schedule, seed, landing, workers};
}

// What launchers hear when they ask for the major compute capability.
SIMT_API void simt_capability(int major) {
  simt::capability = major;
}

// Runs a test kernel's launcher on guarded copies of `count` buffers. Returns 0, or 1 with the error's text.
SIMT_API int simt_call(void (*launcher)(const simt_test::Arguments&), int count, void** buffers, const size_t* bytes,
                       const int64_t* numbers, char* error, size_t error_bytes) {
  std::vector<void*> ours(size_t(count), nullptr);
  int failed = 0;
  const auto attempt = [&](auto f) {
    try {
      f();
    } catch (const std::exception& e) {
      if (!failed) std::snprintf(error, error_bytes, "%s", e.what());
      failed = 1;
    }
  };
  for (int i = 0; i < count; ++i) {
    ours[size_t(i)] = simt::guarded_alloc(bytes[i], 0);
    std::memcpy(ours[size_t(i)], buffers[i], bytes[i]);
  }
  attempt([&] { launcher({ours.data(), numbers}); });
  for (int i = 0; i < count; ++i) {
    std::memcpy(buffers[i], ours[size_t(i)], bytes[i]);
    attempt([&] { simt::guarded_free(ours[size_t(i)]); });
  }
  return failed;
}
