#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace acpo {
namespace {

enum class Level { baseline, avx2, avx512, avx512bf16, amx };

const char* name(Level level) {
  switch (level) {
    case Level::amx:
      return "amx";
    case Level::avx512bf16:
      return "avx512bf16";
    case Level::avx512:
      return "avx512";
    case Level::avx2:
      return "avx2";
    case Level::baseline:
      break;
  }
  return "baseline";
}

// The system hands out the tile registers' state on request only, to the whole process.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  static const bool granted = [] {
    constexpr unsigned long request_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1u) || !(d >> 24 & 1u)) return false;  // AMX-BF16, AMX-TILE
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

bool has(Level level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (level) {
    case Level::amx:
      return avx512 && __builtin_cpu_supports("avx512bf16") && tiles_granted();
    case Level::avx512bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Level::avx512:
      return avx512;
    case Level::avx2:
      return avx2;
    case Level::baseline:
      return true;
  }
#endif
  return level == Level::baseline;
}

Level parse(const std::string& wanted) {
  for (Level level : {Level::baseline, Level::avx2, Level::avx512, Level::avx512bf16, Level::amx}) {
    if (wanted != name(level)) continue;
    if (!has(level)) throw std::invalid_argument("ACPO_CPU_ISA=" + wanted + ": this machine does not have it");
    return level;
  }
  throw std::invalid_argument("ACPO_CPU_ISA must be amx, avx512bf16, avx512, avx2 or baseline, got '" + wanted + "'");
}

Level choose() {
  if (const char* wanted = std::getenv("ACPO_CPU_ISA"); wanted != nullptr && *wanted != '\0') return parse(wanted);
  for (Level level : {Level::amx, Level::avx512bf16, Level::avx512, Level::avx2}) {
    if (has(level)) return level;
  }
  return Level::baseline;
}

std::atomic<int> restricted{-1};

Level level() {
  static const Level chosen = choose();
  const int now = restricted.load(std::memory_order_relaxed);
  return now < 0 ? chosen : static_cast<Level>(now);
}

}  // namespace

Isa isa() {
  const Level now = level();
  return now == Level::baseline ? Isa::baseline : now == Level::avx2 ? Isa::avx2 : Isa::avx512;
}

bool has_tiles() { return level() == Level::amx; }

bool has_pairs() { return level() == Level::avx512bf16; }

const char* isa_name() { return name(level()); }

void restrict_isa(const std::string& wanted) { restricted.store(wanted.empty() ? -1 : static_cast<int>(parse(wanted))); }

}  // namespace acpo
