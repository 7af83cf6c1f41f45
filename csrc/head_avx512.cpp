#include "simd_avx512.h"
// The lanes first: the kernels are written over them.
#include "head_lanes.h"

namespace acpo {
const HeadKernels head_avx512 = head_kernels;
}
