// "wgmma.mma_async" m64nNk16 with float accumulators, and its fence, commit and wait. Included by ptx_sm90.cuh.
//
// d [64, N] (+)= a [64, 16] b [16, N] by a warpgroup. Register j of lane l in warp w is row 16 w + l / 4 + 8 (j / 2 %
// 2), column 8 (j / 4) + 2 (l % 4) + j % 2. A from registers has the fragments of mma m16n8k16, each warp its sixteen
// rows.
#pragma once

namespace igpt {
namespace cuda {
namespace ptx {

// Orders this thread's register accesses before the wgmma that follow; needed before the first and after every wait.
PTX_FN void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
PTX_FN void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
PTX_FN void wgmma_wait() {  // until at most the N newest groups are in flight
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// No instruction, but the compiler moves no access of d across it: a wait does not name the registers it waits for.
template <int N>
PTX_FN void hold_registers(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Stands behind the last loop that reads fragments as left operands. ptxas before CUDA 13.3 gives their registers to
// others between two turns of a loop, as if nobody read them again (attention_dkdv of D = 64 was wrong from the second
// tile on). Here a store reads them that never happens, as no block has a second dimension. `make sass` looks for it.
template <int N>
PTX_FN void still_wanted(const uint32_t (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    asm volatile(
        "{\n\t.reg .pred p;\n\t.reg .b32 y;\n\tmov.u32 y, %%tid.y;\n\tsetp.ne.u32 p, y, 0;\n\t"
        "@p st.shared.v4.b32 [y], {%0, %1, %2, %3};\n\t}" ::"r"(x[i][0]),
        "r"(x[i][1]), "r"(x[i][2]), "r"(x[i][3])
        : "memory");
}
PTX_FN void still_wanted(uint32_t) {}  // where they lie in shared memory

// Sixteen registers at a time: their operands, and their places in the instruction.
#define IGPT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define IGPT_D16(i) IGPT_D4(i), IGPT_D4(i + 4), IGPT_D4(i + 8), IGPT_D4(i + 12)
#define IGPT_D32 IGPT_D16(0), IGPT_D16(16)
#define IGPT_D48 IGPT_D32, IGPT_D16(32)
#define IGPT_D64 IGPT_D48, IGPT_D16(48)
#define IGPT_D96 IGPT_D64, IGPT_D16(64), IGPT_D16(80)
#define IGPT_D128 IGPT_D96, IGPT_D16(96), IGPT_D16(112)
#define IGPT_TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define IGPT_R30 IGPT_TEN("") "," IGPT_TEN("1") "," IGPT_TEN("2")
#define IGPT_R60 IGPT_R30 "," IGPT_TEN("3") "," IGPT_TEN("4") "," IGPT_TEN("5")
#define IGPT_R90 IGPT_R60 "," IGPT_TEN("6") "," IGPT_TEN("7") "," IGPT_TEN("8")
#define IGPT_R32 IGPT_R30 ",%30,%31"
#define IGPT_R48 IGPT_R30 "," IGPT_TEN("3") ",%40,%41,%42,%43,%44,%45,%46,%47"
#define IGPT_R64 IGPT_R60 ",%60,%61,%62,%63"
#define IGPT_R96 IGPT_R90 ",%90,%91,%92,%93,%94,%95"
#define IGPT_R128 \
  IGPT_R90 "," IGPT_TEN("9") "," IGPT_TEN("10") "," IGPT_TEN("11") ",%120,%121,%122,%123,%124,%125,%126,%127"

// n columns, type, registers, their operands, then the numbers of the operands after them.
#define IGPT_WGMMA_SS(n, type, R, D, a_, b_, p_, ta_, tb_)                                               \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" p_ ", 0;\n\twgmma.mma_async.sync.aligned.m64n" n \
               "k16.f32." type "." type " {" R "}, %" a_ ", %" b_ ", p, 1, 1, %" ta_ ", %" tb_ ";\n\t}"  \
               : D                                                                                       \
               : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN))
#define IGPT_WGMMA_RS(n, type, R, D, a0_, a1_, a2_, a3_, b_, p_, tb_)                                                 \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" p_ ", 0;\n\twgmma.mma_async.sync.aligned.m64n" n              \
               "k16.f32." type "." type " {" R "}, {%" a0_ ", %" a1_ ", %" a2_ ", %" a3_ "}, %" b_ ", p, 1, 1, %" tb_ \
               ";\n\t}"                                                                                               \
               : D                                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(B_MN))

#define IGPT_SS(type)                                                              \
  if constexpr (N == 64)                                                           \
    IGPT_WGMMA_SS("64", type, IGPT_R32, IGPT_D32, "32", "33", "34", "35", "36");   \
  else if constexpr (N == 96)                                                      \
    IGPT_WGMMA_SS("96", type, IGPT_R48, IGPT_D48, "48", "49", "50", "51", "52");   \
  else if constexpr (N == 128)                                                     \
    IGPT_WGMMA_SS("128", type, IGPT_R64, IGPT_D64, "64", "65", "66", "67", "68");  \
  else if constexpr (N == 192)                                                     \
    IGPT_WGMMA_SS("192", type, IGPT_R96, IGPT_D96, "96", "97", "98", "99", "100"); \
  else                                                                             \
    IGPT_WGMMA_SS("256", type, IGPT_R128, IGPT_D128, "128", "129", "130", "131", "132")
#define IGPT_RS(type)                                                                            \
  if constexpr (N == 64)                                                                         \
    IGPT_WGMMA_RS("64", type, IGPT_R32, IGPT_D32, "32", "33", "34", "35", "36", "37", "38");     \
  else if constexpr (N == 96)                                                                    \
    IGPT_WGMMA_RS("96", type, IGPT_R48, IGPT_D48, "48", "49", "50", "51", "52", "53", "54");     \
  else if constexpr (N == 128)                                                                   \
    IGPT_WGMMA_RS("128", type, IGPT_R64, IGPT_D64, "64", "65", "66", "67", "68", "69", "70");    \
  else if constexpr (N == 192)                                                                   \
    IGPT_WGMMA_RS("192", type, IGPT_R96, IGPT_D96, "96", "97", "98", "99", "100", "101", "102"); \
  else                                                                                           \
    IGPT_WGMMA_RS("256", type, IGPT_R128, IGPT_D128, "128", "129", "130", "131", "132", "133", "134")

// Both operands by descriptor; A_MN, B_MN: 1 when M or N, not K, is the direction of 16-byte runs. accumulate = 0
// writes d anew.
template <int N, class E, int A_MN = 0, int B_MN = 0>
PTX_FN void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "wgmma of this width is not wrapped");
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    IGPT_SS("bf16");
  } else {
    IGPT_SS("f16");
  }
}
// A from registers.
template <int N, class E, int B_MN = 0>
PTX_FN void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "wgmma of this width is not wrapped");
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    IGPT_RS("bf16");
  } else {
    IGPT_RS("f16");
  }
}

#undef IGPT_D4
#undef IGPT_D16
#undef IGPT_D32
#undef IGPT_D48
#undef IGPT_D64
#undef IGPT_D96
#undef IGPT_D128
#undef IGPT_TEN
#undef IGPT_R30
#undef IGPT_R60
#undef IGPT_R90
#undef IGPT_R32
#undef IGPT_R48
#undef IGPT_R64
#undef IGPT_R96
#undef IGPT_R128
#undef IGPT_WGMMA_SS
#undef IGPT_WGMMA_RS
#undef IGPT_SS
#undef IGPT_RS

}  // namespace ptx
}  // namespace cuda
}  // namespace igpt
