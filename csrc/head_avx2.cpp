#include "simd_avx2.h"
// The lanes first: the kernels are written over them.
#include "head_lanes.h"

namespace acpo {
const HeadKernels head_avx2 = head_kernels;
}
