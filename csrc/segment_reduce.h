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

// What follows is compiled once for each instruction set, for one channel: x and gradient [N] of the values' dtype; out, output and grad
// of the result's, from the group `first` on.
struct GroupTokens {
  const int64_t *offsets, *through;  // as in Groups
  int64_t tokens;
  const uint8_t* mask;
};
struct GroupKernels {
  struct Typed {  // indexed by Reduce, or [is max]
    // Of the groups [first, last), each at most a PIECE long
    void (*groups[3])(const void* x, const GroupTokens& of, int64_t first, int64_t last, void* out);
    // The sum or the maximum of the tokens [begin, end), and those that attain a given one
    double (*piece[2])(const void* x, const GroupTokens& of, int64_t begin, int64_t end);
    int64_t (*ties)(const void* x, const GroupTokens& of, int64_t begin, int64_t end, double top);
    // The gradient of the groups [first, last), and of the tokens [begin, end) of one whose gradient is shared by `by` tokens
    void (*gradients[3])(const void* x, const GroupTokens& of, int64_t first, int64_t last, const void* grad, const void* output, void* gradient);
    void (*gradient_piece[2])(const void* x, const GroupTokens& of, int64_t begin, int64_t end, double grad, int64_t by, double top, void* gradient);
  };
  Typed typed[2][4];                                                                          // [masked][Dtype]
  int64_t (*count)(const uint8_t* mask, int64_t n, int64_t available);                        // the ones among n bytes, `available` may be read
  bool (*spans)(const int64_t* offsets, int64_t count, int64_t* longest);                     // whether none of the steps is negative; the longest
};
extern const GroupKernels segment_reduce_baseline, segment_reduce_avx2, segment_reduce_avx512;
const GroupKernels& group_kernels();

}  // namespace acpo
