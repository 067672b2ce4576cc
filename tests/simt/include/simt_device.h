// What a kernel sees of the bench: its indices, warp and block collectives, atomics, shared memory and the launch.
//
// g++ reads the CUDA sources with this in place of CUDA's headers. Every collective carries the file and line of its
// caller, so that a report of who waits where can name them.
#pragma once
#include <stdexcept>
#include <tuple>
#include <utility>

#include "simt_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct BlockIds {
  uint3 index;
  dim3 dim, grid;
};
struct Thread {
  uint3 index;
  BlockIds* ids;
};
extern thread_local Thread* self;  // the CUDA thread that runs now

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// How the threads of a launch take turns, and when asynchronous copies and products take effect.
enum Schedule { kInOrder = 0, kReverse = 1, kRandom = 2 };
enum Landing { kLate = 0, kAtOnce = 1 };
struct Config {
  int schedule = kInOrder;
  uint64_t seed = 1;
  int landing = kLate;
  int workers = 1;  // OS threads of a launch
};
Config& config();

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, dim3 cluster, size_t shared,
            void (*body)(void*), void* context);
template <class... P, class... A>
void launch_kernel(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, dim3 cluster, size_t shared,
                   A&&... a) {
  std::tuple<std::remove_const_t<P>...> args(std::forward<A>(a)...);  // copied once, as a real launch does
  auto body = [&] { std::apply(kernel, args); };
  launch(
      name, reinterpret_cast<const void*>(kernel), grid, block, cluster, shared,
      [](void* c) { (*static_cast<decltype(body)*>(c))(); }, &body);
}
void allow_shared(const void* kernel, size_t bytes);

void* dynamic_shared(size_t align);
void* static_shared(const void* key, const char* name, size_t bytes, size_t align);
template <class T, class Tag>
T& static_array(const char* name) {
  static char key;
  return *static_cast<T*>(static_shared(&key, name, sizeof(T), alignof(T)));
}

enum class Shuffle { index, exclusive_or, down, up };
uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle how, int argument, int width, const char* file, int line);
uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line);
uint32_t match(uint32_t mask, uint64_t value, bool all, const char* file, int line);
enum class Fold { add, min, max, bit_and, bit_or, bit_xor };
int64_t fold(uint32_t mask, int64_t value, Fold how, const char* file, int line);
void sync_warp(uint32_t mask, const char* file, int line);
int sync_block(int vote, const char* file, int line);  // → how many threads voted other than 0
void maybe_yield();                                    // a place where a random schedule may switch

template <class T>
inline T shuffle_as(uint32_t mask, T value, Shuffle how, int argument, int width, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = shuffle(mask, word, how, argument, width, file, line);
  std::memcpy(static_cast<void*>(&value), &word, sizeof value);
  return value;
}

template <class T, class F>
inline T update(T* p, F f) {  // an atomic by compare and swap; blocks may run on several processors
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  maybe_yield();
  Word *at = reinterpret_cast<Word*>(p), old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &old, bits<Word>(T(f(bits<T>(old)))), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return bits<T>(old);
}

}  // namespace simt

#define threadIdx (::simt::self->index)
#define blockIdx (::simt::self->ids->index)
#define blockDim (::simt::self->ids->dim)
#define gridDim (::simt::self->ids->grid)
constexpr int warpSize = 32;

inline void __syncthreads(SIMT_HERE) {
  simt::sync_block(0, file, line);
}
inline int __syncthreads_count(int p, SIMT_HERE) {
  return simt::sync_block(p != 0, file, line);
}
inline int __syncthreads_or(int p, SIMT_HERE) {
  return simt::sync_block(p != 0, file, line) != 0;
}
inline int __syncthreads_and(int p, SIMT_HERE) {
  return simt::sync_block(p == 0, file, line) == 0;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_HERE) {
  simt::sync_warp(mask, file, line);
}
template <class T>
inline T __shfl_sync(uint32_t mask, T v, int lane, int width = 32, SIMT_HERE) {
  return simt::shuffle_as(mask, v, simt::Shuffle::index, lane, width, file, line);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32, SIMT_HERE) {
  return simt::shuffle_as(mask, v, simt::Shuffle::exclusive_or, lanes, width, file, line);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle_as(mask, v, simt::Shuffle::down, int(delta), width, file, line);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle_as(mask, v, simt::Shuffle::up, int(delta), width, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, SIMT_HERE) {
  return simt::ballot(mask, p != 0, file, line);
}
inline int __any_sync(uint32_t mask, int p, SIMT_HERE) {
  return simt::ballot(mask, p != 0, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int p, SIMT_HERE) {
  return simt::ballot(mask, p == 0, file, line) == 0;
}
template <class T>
inline uint32_t __match_any_sync(uint32_t mask, T v, SIMT_HERE) {
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof v);
  return simt::match(mask, word, false, file, line);
}
template <class T>
inline uint32_t __match_all_sync(uint32_t mask, T v, int* same, SIMT_HERE) {
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof v);
  const uint32_t found = simt::match(mask, word, true, file, line);
  *same = found != 0;
  return found;
}
#define IGPT_FOLD(name, how)                                                        \
  template <class T>                                                                \
  inline T name(uint32_t mask, T v, SIMT_HERE) {                                    \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "32-bit"); \
    return T(simt::fold(mask, int64_t(v), simt::Fold::how, file, line));            \
  }
IGPT_FOLD(__reduce_add_sync, add)
IGPT_FOLD(__reduce_min_sync, min)
IGPT_FOLD(__reduce_max_sync, max)
IGPT_FOLD(__reduce_and_sync, bit_and)
IGPT_FOLD(__reduce_or_sync, bit_or)
IGPT_FOLD(__reduce_xor_sync, bit_xor)
#undef IGPT_FOLD

inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

template <class T>
inline T atomicAdd(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return T(old + v); });
}
template <class T>
inline T atomicSub(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return T(old - v); });
}
template <class T>
inline T atomicMax(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return old < v ? v : old; });
}
template <class T>
inline T atomicMin(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return v < old ? v : old; });
}
template <class T>
inline T atomicAnd(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return old & v; });
}
template <class T>
inline T atomicOr(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return old | v; });
}
template <class T>
inline T atomicXor(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return old ^ v; });
}
template <class T>
inline T atomicExch(T* p, std::common_type_t<T> v) {
  return simt::update(p, [=](T) { return v; });
}
template <class T>
inline T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return simt::update(p, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::update(p, [=](unsigned old) { return old >= limit ? 0u : old + 1u; });
}

template <class T>
inline T __ldca(const T* p) {
  return *p;
}
template <class T>
inline void __stwb(T* p, T v) {
  *p = v;
}

// The macros of csrc/cuda/device.cuh and launch.h, with the same meaning.
#define DYN_SMEM(T, name) T* name = static_cast<T*>(::simt::dynamic_shared(128))
#define DYN_SMEM_1024(T, name) T* name = static_cast<T*>(::simt::dynamic_shared(1024))
#define STATIC_SMEM(T, name, count) \
  struct name##_shared;             \
  T(&name)[count] = ::simt::static_array<T[count], name##_shared>(#name)
#define LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  ((void)(stream), ::simt::launch_kernel(#kernel, kernel, blocks, threads, dim3(1), shared, __VA_ARGS__))
#define LAUNCH_CLUSTER(kernel, blocks, threads, cluster, shared, stream, ...) \
  ((void)(stream), ::simt::launch_kernel(#kernel, kernel, blocks, threads, cluster, shared, __VA_ARGS__))
