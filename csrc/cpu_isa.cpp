// Asked once a process; only AMX needs more than CPUID: Linux hands out the tile registers on request.
#include "cpu_isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#define EVAD_X86 1
#include <cpuid.h>
#endif
#if defined(EVAD_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace evad {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};
constexpr int kCount = static_cast<int>(std::size(kNames));

#if defined(EVAD_X86) && defined(EVAD_AMX)
// The tile registers must be asked for, once a process; the kernel refuses where the machine has none.
bool has_amx_bf16() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & kAvx512Bf16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(EVAD_X86) && defined(EVAD_AVX2)
// Not every compiler that builds this knows the name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kF16c = 1u << 29;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & kF16c) != 0;
}
#endif

// A compiler may lack what the machine has: CMakeLists.txt defines EVAD_<ISA> for what was compiled.
Isa detect() {
#if defined(EVAD_X86) && defined(EVAD_AVX2)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return Isa::baseline;
#if defined(EVAD_AVX512)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
#if defined(EVAD_AMX)
  if (has_amx_bf16()) return Isa::amx;
#endif
  return Isa::avx512;
#else
  return Isa::avx2;
#endif
#else
  return Isa::baseline;
#endif
}

Isa parse(const std::string& name) {
  std::string expected;
  for (int i = 0; i < kCount; ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
    expected += (i == 0 ? "" : i < kCount - 1 ? ", " : " or ") + std::string(kNames[i]);
  }
  throw std::invalid_argument("EVAD_KERNELS_CPU_ISA must be " + expected + ", got '" + name + "'");
}

std::atomic<int>& cap() {
  static std::atomic<int> value = [] {
    const char* name = std::getenv("EVAD_KERNELS_CPU_ISA");
    return static_cast<int>(name && *name ? parse(name) : detected_isa());
  }();
  return value;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa cpu_isa() { return std::min(detected_isa(), static_cast<Isa>(cap().load())); }

void set_isa_cap(const std::string& name) { cap() = static_cast<int>(parse(name)); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace evad
