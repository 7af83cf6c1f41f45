#define SEGMENT_BYTES 64
#include "segment_credit_lanes.h"

namespace acpo {
const CreditKernels segment_credit_avx512 = kernels;
}
