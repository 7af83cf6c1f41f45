#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace acpo {

constexpr size_t HUGE_PAGE = size_t{2} << 20;

// Asks for huge pages, whose first touch costs a tenth, for the whole ones inside a large piece of memory.
inline void prefer_huge_pages(void* p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, end = reinterpret_cast<uintptr_t>(p) + bytes;
  if (bytes >= 2 * HUGE_PAGE && end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(p), static_cast<void>(bytes);
#endif
}

// Scratch memory at a multiple of 64 bytes.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats) {
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(floats, 1)) * sizeof(float);
    const size_t unit = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    p_.reset(static_cast<float*>(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit)));
    if (!p_) throw std::bad_alloc();
    prefer_huge_pages(p_.get(), bytes);
  }
  float* get() const { return p_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> p_;
};

}  // namespace acpo
