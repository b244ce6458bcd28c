// Which instruction set the CPU kernels use: the best that this machine has and the build too, or less when asked to.
#pragma once

#include <string>

namespace evad {

// In order: each includes the ones before it. baseline is what the compiler targets by default.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The best for which this machine has the instructions and this build the kernels.
Isa detected_isa();

// detected_isa(), capped by set_isa_cap or, before it is called, by the environment variable EVAD_KERNELS_CPU_ISA.
Isa cpu_isa();

// "baseline", "avx2", "avx512" or "amx"; throws std::invalid_argument for another name.
void set_isa_cap(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace evad
