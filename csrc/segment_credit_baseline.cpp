#define SEGMENT_BYTES 16
#include "segment_credit_lanes.h"

namespace acpo {
const CreditKernels segment_credit_baseline = kernels;
}
