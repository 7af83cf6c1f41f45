#include "segment_reduce.h"

#include <vector>

#include "floats.h"
#include "isa.h"

namespace acpo {
namespace {

inline double widen(double x) { return x; }
template <class T>
double widen(T x) {
  return to_float(x);
}

inline void narrow(double x, double* out) { *out = x; }
template <class T>
void narrow(double x, T* out) {
  from_float(static_cast<float>(x), out);
}

struct Sum {
  double sum = 0.0;
  int64_t count = 0;
  void operator+=(const Sum& other) {
    sum += other.sum;
    count += other.count;
  }
};

struct Max {
  double max = 0.0;
  void operator+=(const Max& other) { max = other.max > max || other.max != other.max ? other.max : max; }  // a NaN stays
};

struct Count {
  int64_t count = 0;
  void operator+=(const Count& other) { count += other.count; }
};

template <class T, class Out>
void forward(const SegmentReduce& of, Dtype dtype, const T* values, int64_t stride, Out* out, int threads) {
  const Groups groups(of.hierarchy, of.sequences);
  const GroupKernels& kernels = group_kernels();
  const bool masked = of.mask != nullptr, mean = of.reduce == Reduce::mean;
  const auto run = (of.reduce == Reduce::max ? kernels.max : kernels.sum)[masked][static_cast<int>(dtype)];
  const auto part = [&](int64_t c, int64_t begin, int64_t end) {
    return run(values + c * stride + begin, masked ? of.mask + begin : nullptr, end - begin, groups.tokens - begin);
  };
  if (of.reduce == Reduce::max) {
    reduce<Max>(
        groups, of.channels, threads, [&](int64_t c, int64_t, int64_t begin, int64_t end) { return Max{part(c, begin, end)}; },
        [&](int64_t c, int64_t g, const Max& all) { out[c * groups.count + g] = static_cast<Out>(all.max); });
    return;
  }
  reduce<Sum>(
      groups, of.channels, threads,
      [&](int64_t c, int64_t, int64_t begin, int64_t end) {
        return Sum{part(c, begin, end), mean && masked ? kernels.count(of.mask + begin, end - begin, groups.tokens - begin) : end - begin};
      },
      [&](int64_t c, int64_t g, const Sum& all) {
        out[c * groups.count + g] = static_cast<Out>(mean && all.count > 1 ? all.sum / static_cast<double>(all.count) : all.sum);
      });
}

// to[from, until) = value, a vector at a time: the last one may write past `until`, as far as `last`, and the next run comes after it.
template <class T>
void fill(T* to, int64_t from, int64_t until, int64_t last, T value) {
  constexpr int STEP = 128 / sizeof(T);  // the length of most groups: no branch to guess
  for (; from < until && from + STEP <= last; from += STEP) {
    for (int k = 0; k < STEP; ++k) to[from + k] = value;
  }
  for (; from < until; ++from) to[from] = value;
}

template <class T, class Out>
void backward(const SegmentReduce& of, const Out* grad, const T* values, int64_t stride, const Out* output, T* gradient, int threads) {
  const Groups groups(of.hierarchy, of.sequences);
  const GroupKernels& kernels = group_kernels();
  const bool is_max = of.reduce == Reduce::max;
  // By what a group's gradient is divided: its unmasked tokens (mean), or those that attain its maximum.
  std::vector<int64_t> shares;
  if (is_max || (of.reduce == Reduce::mean && of.mask != nullptr)) {
    shares.resize(static_cast<size_t>((is_max ? of.channels : 1) * groups.count));
    reduce<Count>(
        groups, is_max ? of.channels : 1, threads,
        [&](int64_t c, int64_t g, int64_t begin, int64_t end) {
          if (!is_max) return Count{kernels.count(of.mask + begin, end - begin, groups.tokens - begin)};
          Count all;
          const double top = output[c * groups.count + g];
          const T* x = values + c * stride;
          for (int64_t t = begin; t < end; ++t) all.count += widen(x[t]) == top && (of.mask == nullptr || of.mask[t]);
          return all;
        },
        [&](int64_t c, int64_t g, const Count& all) { shares[c * groups.count + g] = all.count; });
  }
  const int64_t tokens = groups.tokens, blocks = (tokens + SHARE - 1) / SHARE;
  parallel_for(blocks * of.channels, 1, of.channels * tokens <= SERIAL ? 1 : threads, [&](int64_t item, int64_t last_item) {
    for (; item < last_item; ++item) {
      const int64_t c = item / blocks, first = item % blocks * SHARE, last = std::min(first + SHARE, tokens);
      T* to = gradient + c * tokens;
      groups.runs(first, last, [&](int64_t g, int64_t from, int64_t until) {
        double share = grad[c * groups.count + g];
        int64_t by = 1;
        if (!shares.empty()) {
          by = shares[(is_max ? c * groups.count : 0) + g];
        } else if (of.reduce == Reduce::mean) {
          by = groups.end(g) - groups.begin(g);
        }
        if (by > 1) share /= static_cast<double>(by);
        T value, zero;
        narrow(share, &value);
        narrow(0.0, &zero);
        if (is_max) {
          const double top = output[c * groups.count + g];
          const T* x = values + c * stride;
          for (int64_t t = from; t < until; ++t) to[t] = widen(x[t]) == top && (of.mask == nullptr || of.mask[t]) ? value : zero;
        } else if (of.mask != nullptr) {
          for (int64_t t = from; t < until; ++t) to[t] = of.mask[t] ? value : zero;
        } else {
          fill(to, from, until, last, value);
        }
      });
    }
  });
}

// call(T*, Out*) with null pointers of the element's and the result's type
template <class Call>
void with_types(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::float32:
      return call(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case Dtype::bfloat16:
      return call(static_cast<bf16*>(nullptr), static_cast<float*>(nullptr));
    case Dtype::float16:
      return call(static_cast<fp16*>(nullptr), static_cast<float*>(nullptr));
    case Dtype::float64:
      return call(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  }
}

}  // namespace

const GroupKernels& group_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512:
      return segment_reduce_avx512;
    case Isa::avx2:
      return segment_reduce_avx2;
    case Isa::baseline:
      break;
  }
#else
  isa();  // an ACPO_CPU_ISA that this machine lacks is an error here too
#endif
  return segment_reduce_baseline;
}

void segment_reduce(const SegmentReduce& of, const void* values, Dtype dtype, int64_t channel_stride, void* out, int threads) {
  of.hierarchy.check();
  with_types(dtype, [&]<class T, class Out>(T*, Out*) {
    forward(of, dtype, static_cast<const T*>(values), channel_stride, static_cast<Out*>(out), threads);
  });
}

void segment_reduce_backward(const SegmentReduce& of, const void* grad, const void* values, Dtype dtype, int64_t channel_stride,
                             const void* output, void* gradient, int threads) {
  of.hierarchy.check();
  with_types(dtype, [&]<class T, class Out>(T*, Out*) {
    backward(of, static_cast<const Out*>(grad), static_cast<const T*>(values), channel_stride, static_cast<const Out*>(output),
             static_cast<T*>(gradient), threads);
  });
}

}  // namespace acpo
