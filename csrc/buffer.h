// Scratch memory of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "recycle.h"

namespace acpo {

// At a multiple of 64 bytes; large ones are recycled.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(std::max<int64_t>(floats, 1)) * sizeof(float) + 63) / 64 * 64;
    const bool large = bytes >= RECYCLED;
    p_ = {static_cast<float*>(large ? recycle_take(bytes) : std::aligned_alloc(64, bytes)), Free{large ? bytes : 0}};
    if (!p_) throw std::bad_alloc();
  }
  float* get() const { return p_.get(); }

 private:
  struct Free {
    size_t recycled;  // bytes; 0 where malloc gave them
    void operator()(float* p) const {
      if (recycled > 0) {
        recycle_give(p, recycled);
      } else {
        std::free(p);
      }
    }
  };
  std::unique_ptr<float, Free> p_{nullptr, Free{0}};
};

}  // namespace acpo
