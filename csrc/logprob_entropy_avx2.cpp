#include "simd_avx2.h"
// The lanes first: the row kernels are written over them.
#include "logprob_entropy_row.h"

namespace acpo {
const RowKernels logprob_entropy_avx2 = kernels;
}
