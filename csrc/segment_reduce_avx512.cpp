#define SEGMENT_BYTES 64
#include "segment_reduce_lanes.h"

namespace acpo {
const GroupKernels segment_reduce_avx512 = kernels;
}
