#include "simd_baseline.h"
// The lanes first: the row kernels are written over them.
#include "logprob_entropy_row.h"

namespace acpo {
const RowKernels logprob_entropy_baseline = kernels;
}
