#define SEGMENT_BYTES 32
#include "segment_credit_lanes.h"

namespace acpo {
const CreditKernels segment_credit_avx2 = kernels;
}
