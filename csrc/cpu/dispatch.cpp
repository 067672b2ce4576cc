// The only file that asks the processor what it is. Compiled for the baseline, so that asking is always safe.
#include "../ops.h"

#if defined(IGPT_X86)
#include <cpuid.h>
#endif
#if defined(IGPT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(IGPT_AMX)
namespace amx {
const Ops& table();
}

// Linux gives a process the tiles' 8 KB a thread only if it asks, and then for good.
static bool tiles_granted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of Linux 5.16
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}
#endif
#endif

std::string cpu_why_not(const std::string& isa) {
  if (isa == "baseline") return "";
#if defined(IGPT_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx2") return avx2 ? "" : "this processor has no AVX2 with FMA";
  if (isa == "avx512") return avx512 ? "" : "this processor has no AVX-512 (F, BW, VL, DQ)";
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512_bf16") return avx512_bf16 ? "" : "this processor has no AVX-512 bf16 instructions";
#if defined(IGPT_AMX)
  if (isa == "amx") {
    if (!avx512_bf16 || !__builtin_cpu_supports("amx-bf16")) return "this processor has no AMX for bf16";
    return tiles_granted() ? "" : "the operating system does not let this process use AMX";
  }
#endif
#endif
  return isa + " is not in this build: another architecture, or a compiler that does not know it";
}

bool cpu_is_wide_amd() {
#if defined(IGPT_X86)
  // Families count on from 15 in the extended field. Zen 4, family 25, takes two cycles for 512 bits. So, it is said,
  // do Zen 5's mobile kinds, which are not told apart.
  unsigned eax = 0, ebx, ecx, edx;
  const bool found = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0;
  return found && __builtin_cpu_is("amd") && (eax >> 8 & 15) + (eax >> 20 & 255) >= 26 && cpu_why_not("avx512").empty();
#else
  return false;
#endif
}

const Ops* cpu_ops(const std::string& isa) {
  if (!cpu_why_not(isa).empty()) return nullptr;
#if defined(IGPT_X86)
#if defined(IGPT_AMX)
  if (isa == "amx") return &amx::table();
#endif
  if (isa == "avx512_bf16") return &avx512_bf16::table();
  if (isa == "avx512") return &avx512::table();
  if (isa == "avx2") return &avx2::table();
#endif
  return &baseline::table();
}

}  // namespace igpt
