// Sum, mean and maximum over segments or sequences, and their gradient: the contract is acpo_kernels/segment_reduce.py.
#pragma once

#include <cstdint>

#include "groups.h"

namespace acpo {

enum class Reduce { sum, mean, max };

struct SegmentReduce {
  Hierarchy hierarchy;
  bool sequences;  // the groups are the sequences, not the segments
  Reduce reduce;
  const uint8_t* mask;  // [N], or null
  int64_t channels;
};

// values [C, N], each channel contiguous, channel_stride elements apart; out: contiguous [C, groups], float32 (float64 for float64).
void segment_reduce(const SegmentReduce& of, const void* values, Dtype dtype, int64_t channel_stride, void* out, int threads);

// grad, output: contiguous [C, groups] of out's dtype; gradient: contiguous [C, N] of `dtype`. values and output: for Reduce::max.
void segment_reduce_backward(const SegmentReduce& of, const void* grad, const void* values, Dtype dtype, int64_t channel_stride,
                             const void* output, void* gradient, int threads);

// The tokens of one group or a piece of one, compiled once for each instruction set: n of them, `available` of which may be read.
struct GroupKernels {
  using Of = double (*)(const void* values, const uint8_t* mask, int64_t n, int64_t available);
  Of sum[2][4], max[2][4];  // [masked][Dtype]
  int64_t (*count)(const uint8_t* mask, int64_t n, int64_t available);
};
extern const GroupKernels segment_reduce_baseline, segment_reduce_avx2, segment_reduce_avx512;
const GroupKernels& group_kernels();

}  // namespace acpo
