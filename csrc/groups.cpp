#include "groups.h"

#include <stdexcept>
#include <string>

#include "floats.h"
#include "segment_reduce.h"

namespace acpo {
namespace {

int64_t check_offsets(const char* name, const int64_t* offsets, int64_t count, int64_t last) {
  int64_t longest = 0;
  if (offsets[0] != 0 || offsets[count] != last || !group_kernels().spans(offsets, count, &longest)) {
    throw std::invalid_argument(std::string(name) + " must start at 0, not decrease, and end at " + std::to_string(last));
  }
  return longest;
}

}  // namespace

double Values::operator[](int64_t i) const {
  i *= stride;
  switch (dtype) {
    case Dtype::float32:
      return static_cast<const float*>(data)[i];
    case Dtype::bfloat16:
      return to_float(static_cast<const bf16*>(data)[i]);
    case Dtype::float16:
      return to_float(static_cast<const fp16*>(data)[i]);
    case Dtype::float64:
      break;
  }
  return static_cast<const double*>(data)[i];
}

Hierarchy::Most Hierarchy::check() const {
  return {check_offsets("token_offsets", token_offsets, segments, tokens), check_offsets("sequence_offsets", sequence_offsets, sequences, segments)};
}

}  // namespace acpo
