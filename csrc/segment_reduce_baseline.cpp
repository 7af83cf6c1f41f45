#define SEGMENT_BYTES 16
#include "segment_reduce_lanes.h"

namespace acpo {
const GroupKernels segment_reduce_baseline = kernels;
}
