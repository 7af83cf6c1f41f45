#include "simd_baseline.h"
// The lanes first: the kernels are written over them.
#include "head_lanes.h"

namespace acpo {
const HeadKernels head_baseline = head_kernels;
}
