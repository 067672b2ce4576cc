// The processor's matrix unit, where the instruction set has one: C [16, 16] += A [16, 32] B [32, 16], A and B bf16, C
// float, each in a tile of 16 rows of 16 units of 32 bits. A's rows are as they are in memory; a row of B holds two
// neighbours along K of 16 columns. A product takes 16 cycles, loading a tile 8.
#pragma once
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

#if defined(__AMX_BF16__)
// While one lives, the thread's eight tiles hold something.
struct MatrixUnit {
  MatrixUnit() {
    // The palette; then 2 bytes of row length each from 16, a count of rows from 48.
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
};
// Not the compiler's intrinsics: to GCC 12 theirs do not read memory, and it moves stores behind them.
// `ld` counts units.
template <int tile>
static IGPT_INLINE void tile_load(const void* p, int64_t ld) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(ld * 4), "i"(tile) : "memory");
}
template <int tile>
static IGPT_INLINE void tile_store(float* p, int64_t ld) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(ld * 4), "i"(tile) : "memory");
}
template <int c, int a, int b>
static IGPT_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(b), "i"(a), "i"(c));
}
template <int tile>
static IGPT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
#else
struct MatrixUnit {
  MatrixUnit() {}  // so that a variable of it is one in use
};
#endif

}  // namespace IGPT_ISA
}  // namespace igpt
