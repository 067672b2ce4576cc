// What the sanitizers must be told. ASan: which stack runs. TSan: each CUDA thread is a fiber of its own, switching
// orders nothing, and only what orders CUDA threads (barriers, collectives of a warp that promise it, mbarriers) does.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

// SIMT_TSAN: the kernels are compiled with -fsanitize=thread, the runtime itself is not: its bookkeeping is no traffic
// of the kernel, and what it copies for a kernel it reports by hand.
#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
void __tsan_read_range(void* at, size_t bytes);
void __tsan_write_range(void* at, size_t bytes);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace simt {

inline void happens_before([[maybe_unused]] void* at) {
#if defined(SIMT_TSAN)
  __tsan_release(at);
#endif
}
inline void happens_after([[maybe_unused]] void* at) {
#if defined(SIMT_TSAN)
  __tsan_acquire(at);
#endif
}
inline void note_read([[maybe_unused]] const void* at, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_TSAN)
  if (bytes) __tsan_read_range(const_cast<void*>(at), bytes);
#endif
}
inline void note_write([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_TSAN)
  if (bytes) __tsan_write_range(at, bytes);
#endif
}

// Within its life the library functions that the runtime calls (memcpy, malloc, free) are not the kernel's accesses.
struct Quiet {
#if defined(SIMT_TSAN)
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
#else
  Quiet() {}
  ~Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

}  // namespace simt
