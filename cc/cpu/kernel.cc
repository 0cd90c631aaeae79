// Which instruction set runs. Compiled with baseline flags only.

#include "cpu/kernel.h"

#include <cstdlib>
#include <cstring>

#if defined(JAX_FA_AMX) && !defined(JAX_FA_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jax_fa {

#define JAX_FA_DECLARE(isa)                     \
  namespace isa {                               \
  void RunForward(const Call&, const Runner&);  \
  void RunBackward(const Call&, const Runner&); \
  void RunTangent(const Call&, const Runner&);  \
  void RunSecond(const Call&, const Runner&);   \
  double RunFma(int64_t, bool, float*);         \
  }
#if defined(JAX_FA_AMX)
JAX_FA_DECLARE(amx_bf16)
#endif
#if defined(JAX_FA_X86)
JAX_FA_DECLARE(avx512_bf16)
JAX_FA_DECLARE(avx512)
JAX_FA_DECLARE(avx2)
#elif defined(JAX_FA_AARCH64)
JAX_FA_DECLARE(neon)
#endif
JAX_FA_DECLARE(portable)

namespace {

bool Always() { return true; }
[[maybe_unused]] bool Never() { return false; }

#if defined(JAX_FA_X86)
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool HasAvx512Bf16() {
#if defined(JAX_FA_ASSUME_AVX512_BF16)  // for tests where a hypervisor hides it
  return HasAvx512();
#else
  return HasAvx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#endif
}
// AMD's cores multiply bfloat16 pairs at twice the rate of floats. Intel's (Sapphire and Emerald Rapids) at half of
// it, measured, so there the float kernels are faster for bfloat16 too.
bool PrefersBf16() { return __builtin_cpu_is("amd"); }
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if defined(JAX_FA_AMX)
bool HasAmxBf16() {
  if (!HasAvx512Bf16()) return false;
#if defined(JAX_FA_EMULATE_AMX)
  return true;
#else
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: Linux saves tiles on demand
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

#define JAX_FA_ENTRIES(isa) isa::RunForward, isa::RunBackward, isa::RunTangent, isa::RunSecond, isa::RunFma
constexpr Kernels kAll[] = {
#if defined(JAX_FA_AMX)
    {"amx_bf16", HasAmxBf16, Never, JAX_FA_ENTRIES(amx_bf16)},  // not yet run on a processor that has it
#endif
#if defined(JAX_FA_X86)
    {"avx512_bf16", HasAvx512Bf16, PrefersBf16, JAX_FA_ENTRIES(avx512_bf16)},
    {"avx512", HasAvx512, Always, JAX_FA_ENTRIES(avx512)},
    {"avx2", HasAvx2, Always, JAX_FA_ENTRIES(avx2)},
#elif defined(JAX_FA_AARCH64)
    {"neon", Always, Always, JAX_FA_ENTRIES(neon)},  // part of AArch64
#endif
    {"portable", Always, Always, JAX_FA_ENTRIES(portable)},
};

}  // namespace

const Kernels* AllKernels(int* count) {
  *count = static_cast<int>(sizeof(kAll) / sizeof(kAll[0]));
  return kAll;
}

const Kernels* ChosenKernels() {
  const char* wanted = std::getenv("JAX_FA_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Kernels& k : kAll)
    if ((any ? k.preferred() : std::strcmp(wanted, k.name) == 0) && k.supported()) return &k;
  return nullptr;
}

}  // namespace jax_fa
