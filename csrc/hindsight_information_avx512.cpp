#include "simd_avx512.h"
// The lanes first: the row kernels are written over them.
#include "hindsight_information_row.h"

namespace acpo {
const PairKernels hindsight_information_avx512 = kernels;
}
