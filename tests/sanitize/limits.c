// Preloaded beside a sanitizer, which reserves terabytes of addresses before anything runs: a limit of a process's address space means what
// is mapped from then on. Without this a verifier's worker, which limits its own, can map nothing more and ends as it begins.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

static rlim_t mapped(void) {
  unsigned long pages = 0;
  FILE* file = fopen("/proc/self/statm", "r");
  if (file != NULL) {
    if (fscanf(file, "%lu", &pages) != 1) pages = 0;
    fclose(file);
  }
  return (rlim_t)pages * sysconf(_SC_PAGESIZE);
}

int setrlimit(__rlimit_resource_t what, const struct rlimit* wanted) {
  int (*next)(__rlimit_resource_t, const struct rlimit*) = (int (*)(__rlimit_resource_t, const struct rlimit*))dlsym(RTLD_NEXT, "setrlimit");
  struct rlimit limit = *wanted;
  if (what == RLIMIT_AS) {
    if (limit.rlim_cur != RLIM_INFINITY) limit.rlim_cur += mapped();
    if (limit.rlim_max != RLIM_INFINITY) limit.rlim_max += mapped();
  }
  return next(what, &limit);
}

int setrlimit64(__rlimit_resource_t what, const struct rlimit64* wanted) { return setrlimit(what, (const struct rlimit*)wanted); }
