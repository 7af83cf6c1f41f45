#include "recycle.h"

#include <sys/mman.h>

#include <mutex>
#include <new>

namespace acpo {
namespace {

constexpr size_t KEPT = 4;  // blocks: a gradient of weight in float32 and one in bfloat16, logits and those that wait
struct Block {
  void* memory;
  size_t bytes;
};
Block kept[KEPT];  // the newest first
std::mutex mutex;  // only tried: a forked child may find it locked for ever, and then does without

}  // namespace

void* recycle_take(size_t bytes) {
  if (std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock.owns_lock()) {
    for (size_t i = 0; i < KEPT; ++i) {
      if (kept[i].memory == nullptr || kept[i].bytes != bytes) continue;
      void* const found = kept[i].memory;
      for (; i + 1 < KEPT; ++i) kept[i] = kept[i + 1];
      kept[KEPT - 1] = {};
      return found;
    }
  }
  void* const fresh = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fresh == MAP_FAILED) throw std::bad_alloc();
  return fresh;
}

void recycle_give(void* memory, size_t bytes) noexcept {
  Block block{memory, bytes};
#if defined(MADV_FREE)
  if (std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock.owns_lock() && ::madvise(memory, bytes, MADV_FREE) == 0) {
    for (Block& place : kept) {
      const Block before = place;
      place = block;
      block = before;
    }
  }
#endif
  if (block.memory != nullptr) ::munmap(block.memory, block.bytes);
}

}  // namespace acpo
