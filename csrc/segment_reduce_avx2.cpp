#define SEGMENT_BYTES 32
#include "segment_reduce_lanes.h"

namespace acpo {
const GroupKernels segment_reduce_avx2 = kernels;
}
