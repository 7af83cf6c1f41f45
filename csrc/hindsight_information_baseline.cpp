#include "simd_baseline.h"
// The lanes first: the row kernels are written over them.
#include "hindsight_information_row.h"

namespace acpo {
const PairKernels hindsight_information_baseline = kernels;
}
