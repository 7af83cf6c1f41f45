#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace acpo {
namespace {

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx2:
      return avx2;
    case Isa::baseline:
      return true;
  }
#endif
  return isa == Isa::baseline;
}

Isa parse(const std::string& wanted) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (wanted != name(isa)) continue;
    if (!has(isa)) throw std::invalid_argument("ACPO_CPU_ISA=" + wanted + ": this machine does not have it");
    return isa;
  }
  throw std::invalid_argument("ACPO_CPU_ISA must be avx512, avx2 or baseline, got '" + wanted + "'");
}

Isa choose() {
  if (const char* wanted = std::getenv("ACPO_CPU_ISA"); wanted != nullptr && *wanted != '\0') return parse(wanted);
  return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

std::atomic<int> restricted{-1};

}  // namespace

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

Isa isa() {
  static const Isa chosen = choose();
  const int now = restricted.load(std::memory_order_relaxed);
  return now < 0 ? chosen : static_cast<Isa>(now);
}

void restrict_isa(const std::string& wanted) { restricted.store(wanted.empty() ? -1 : static_cast<int>(parse(wanted))); }

}  // namespace acpo
