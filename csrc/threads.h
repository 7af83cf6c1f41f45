// Threads for the CPU kernels: those of torch's OpenMP runtime where the process has one (found at run time: it is not ours to
// link against, and a second runtime oversubscribes the cores), else a small pool of worker threads of our own.
#pragma once

#include <cstdint>
#include <functional>

namespace acpo {

// Calls body(begin, end) over disjoint ranges of at most `grain` items that together cover [0, count), on at most
// `threads` threads, the caller among them. The first exception that body throws is rethrown here. Which thread gets
// which range is not fixed, so body's results must not depend on it. Concurrent callers are safe: while one has the
// workers, the others run in their own thread. A forked child starts its own workers.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace acpo
