// Values as doubles, a block at a time. Compiled once per instruction set: internal linkage (see floats.h).
#pragma once

#include "floats.h"
#include "groups.h"

namespace acpo {
namespace {

inline double widen(double x) { return x; }
template <class T>
double widen(T x) {
  return to_float(x);
}

template <class T>
void read_strided(const Values& values, int64_t begin, int64_t n, double* out) {
  const T* x = static_cast<const T*>(values.data) + begin * values.stride;
  if (values.stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i * values.stride]);
  }
}

inline void read_values(const Values& values, int64_t begin, int64_t n, double* out) {
  switch (values.dtype) {
    case Dtype::float32: return read_strided<float>(values, begin, n, out);
    case Dtype::bfloat16: return read_strided<bf16>(values, begin, n, out);
    case Dtype::float16: return read_strided<fp16>(values, begin, n, out);
    case Dtype::float64: return read_strided<double>(values, begin, n, out);
  }
}

}  // namespace
}  // namespace acpo
