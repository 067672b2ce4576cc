// The only file that asks the processor what it is. Compiled for the baseline, so that asking is always safe.
#include "../ops.h"

namespace igpt {

namespace baseline {
const Ops& table();
}
#if defined(IGPT_X86)
namespace avx2 {
const Ops& table();
}
namespace avx512 {
const Ops& table();
}
namespace avx512_bf16 {
const Ops& table();
}
#endif

std::string cpu_why_not(const std::string& isa) {
  if (isa == "baseline") return "";
#if defined(IGPT_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx2") return avx2 ? "" : "this processor has no AVX2 with FMA";
  if (isa == "avx512") return avx512 ? "" : "this processor has no AVX-512 (F, BW, VL, DQ)";
  if (isa == "avx512_bf16")
    return avx512 && __builtin_cpu_supports("avx512bf16") ? "" : "this processor has no AVX-512 bf16 instructions";
#endif
  return isa + " is not compiled for this architecture";
}

const Ops* cpu_ops(const std::string& isa) {
  if (!cpu_why_not(isa).empty()) return nullptr;
#if defined(IGPT_X86)
  if (isa == "avx512_bf16") return &avx512_bf16::table();
  if (isa == "avx512") return &avx512::table();
  if (isa == "avx2") return &avx2::table();
#endif
  return &baseline::table();
}

}  // namespace igpt
