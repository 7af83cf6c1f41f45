// Which instruction set the CPU kernels use: chosen once per process from what the processor has.
#pragma once

#include <string>

namespace acpo {

enum class Isa { baseline, avx2, avx512 };

// The best one the machine has, or the one that ACPO_CPU_ISA = amx | avx512bf16 | avx512 | avx2 | baseline asks for; the first two
// are avx512 with products of bf16.
// Throws std::invalid_argument for an unknown name and for one that this machine lacks.
Isa isa();
bool has_tiles();  // AMX on bf16: the processor and the system have it, and the choice is amx
bool has_pairs();  // VDPBF16PS: the choice is avx512bf16
const char* isa_name();

// Replaces the choice from here on, so that one process can test every path; "" goes back to the first choice.
void restrict_isa(const std::string& name);

}  // namespace acpo

// The copy of an operation's kernels for the instruction set in use: name_baseline, name_avx2 or name_avx512.
#if defined(__x86_64__)
#define ACPO_KERNELS(name) (isa() == Isa::avx512 ? name##_avx512 : isa() == Isa::avx2 ? name##_avx2 : name##_baseline)
#else
#define ACPO_KERNELS(name) (isa(), name##_baseline)  // an ACPO_CPU_ISA that this machine lacks is an error here too
#endif
