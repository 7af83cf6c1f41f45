#include "simd_avx512.h"
// The lanes first: the row kernels are written over them.
#include "logprob_entropy_row.h"

namespace acpo {
const RowKernels logprob_entropy_avx512 = kernels;
}
