#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace acpo {
namespace {

struct Job {
  int64_t count, grain;
  const std::function<void(int64_t, int64_t)>* body;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex{};
  std::exception_ptr error{};

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      try {
        (*body)(begin, std::min(count, begin + grain));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
  }
};

class Pool {
 public:
  std::mutex in_use;  // held by the one caller that has the workers

  void run(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (workers_ < helpers) {
          std::thread(&Pool::loop, this).detach();
          ++workers_;
        }
      } catch (const std::system_error&) {
        helpers = workers_;  // the system gives no more threads: go on with those there are
      }
      job_ = &job;
      wanted_ = helpers;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a worker that has not woken yet is not needed any more
    done_.wait(lock, [this] { return busy_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++busy_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int workers_ = 0, wanted_ = 0, busy_ = 0;
};

// torch's own OpenMP runtime, of this very process, through the entry that GCC, Intel's and LLVM's runtimes have in common.
// Its workers still spin on their cores when torch's last operation is over: a pool of our own would have to share those
// cores with them, and ran a 1 ms kernel at the speed of one thread. Null where torch has none (macOS), and in a forked
// child, whose copy of the runtime waits for threads that it does not have.
using OmpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<bool> forked{false};
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

OmpParallel torch_openmp() {
  static const OmpParallel found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);  // a handle on it reaches the libraries it was linked with
    return torch == nullptr ? nullptr : reinterpret_cast<OmpParallel>(dlsym(torch, "GOMP_parallel"));
  }();
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

// Leaked on purpose: at exit, and in a forked child whose copy has no threads behind it, there is nothing to join.
std::atomic<Pool*> pool{nullptr};
std::once_flag pool_once;

Pool& the_pool() {
  std::call_once(pool_once, [] {
    pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  });
  return *pool.load();
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t ranges = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(ranges, threads)) - 1;
  Job job{count, grain, &body};
  if (helpers <= 0) {
    job.work();
  } else if (const OmpParallel openmp = torch_openmp()) {
    // Always with all of `threads`: a team of another size makes the runtime end threads and start them again.
    openmp([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    Pool& p = the_pool();
    std::unique_lock<std::mutex> lock(p.in_use, std::try_to_lock);
    if (lock.owns_lock()) {
      p.run(job, helpers);
    } else {
      job.work();
    }
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace acpo
