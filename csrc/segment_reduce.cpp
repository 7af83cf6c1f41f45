#include "segment_reduce.h"

#include <vector>

#include "floats.h"
#include "isa.h"

namespace acpo {
namespace {

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

struct Call {
  Groups groups;
  Shares shares;
  GroupTokens of;
  const GroupKernels& all = group_kernels();
  const GroupKernels::Typed& kernels;
  bool is_max;
  int reduce;

  Call(const SegmentReduce& of_call, Dtype dtype)
      : groups(of_call.hierarchy, of_call.sequences),
        shares(groups, TOKENS_GRAIN, checked(of_call)),
        of{groups.offsets, groups.through, groups.tokens, of_call.mask},
        kernels(all.typed[of_call.mask != nullptr][static_cast<int>(dtype)]),
        is_max(of_call.reduce == Reduce::max),
        reduce(static_cast<int>(of_call.reduce)) {}

  static int64_t checked(const SegmentReduce& of_call) {
    const auto most = of_call.hierarchy.check();
    return of_call.sequences ? INT64_MAX : most.tokens;
  }

  int64_t count(int64_t begin, int64_t end) const { return of.mask == nullptr ? end - begin : all.count(of.mask + begin, end - begin, of.tokens - begin); }
};

template <class T, class Out>
void forward(const SegmentReduce& of, Dtype dtype, const T* values, int64_t stride, Out* out, int threads) {
  const Call call(of, dtype);
  const int64_t groups = call.groups.count, pieces = call.shares.pieces();
  std::vector<Sum> sums(static_cast<size_t>(call.is_max ? 0 : pieces * of.channels));
  std::vector<Max> maxima(static_cast<size_t>(call.is_max ? pieces * of.channels : 0));
  call.shares.run(
      of.channels, threads,
      [&](int64_t c, int64_t first, int64_t last) { call.kernels.groups[call.reduce](values + c * stride, call.of, first, last, out + c * groups + first); },
      [&](int64_t c, size_t, int64_t piece, int64_t begin, int64_t end) {
        const double part = call.kernels.piece[call.is_max](values + c * stride, call.of, begin, end);
        if (call.is_max) {
          maxima[c * pieces + piece] = {part};
        } else {
          sums[c * pieces + piece] = {part, of.reduce == Reduce::mean ? call.count(begin, end) : 0};
        }
      });
  if (call.is_max) {
    call.shares.join(of.channels, maxima, [&](int64_t c, size_t i, const Max& all) {
      out[c * groups + call.shares.longs()[i].group] = static_cast<Out>(all.max);
    });
  } else {
    call.shares.join(of.channels, sums, [&](int64_t c, size_t i, const Sum& all) {
      const double by = static_cast<double>(all.count > 1 ? all.count : 1);
      out[c * groups + call.shares.longs()[i].group] = static_cast<Out>(all.sum / by);
    });
  }
}

template <class T, class Out>
void backward(const SegmentReduce& of, Dtype dtype, const Out* grad, const T* values, int64_t stride, const Out* output, T* gradient, int threads) {
  const Call call(of, dtype);
  const int64_t groups = call.groups.count, tokens = call.groups.tokens, pieces = call.shares.pieces();
  const auto& longs = call.shares.longs();
  // By what a long group's gradient is divided: its unmasked tokens (mean), or those that attain its maximum.
  const int64_t each = call.is_max ? of.channels : 1;
  std::vector<int64_t> by(longs.size() * static_cast<size_t>(each), 1);
  if (!longs.empty() && of.reduce != Reduce::sum) {
    std::vector<Count> counts(static_cast<size_t>(pieces * each));
    call.shares.run(
        each, threads, [](int64_t, int64_t, int64_t) {},
        [&](int64_t c, size_t i, int64_t piece, int64_t begin, int64_t end) {
          const auto top = [&] { return static_cast<double>(output[c * groups + longs[i].group]); };
          counts[c * pieces + piece] = {call.is_max ? call.kernels.ties(values + c * stride, call.of, begin, end, top()) : call.count(begin, end)};
        });
    call.shares.join(each, counts, [&](int64_t c, size_t i, const Count& all) { by[c * longs.size() + i] = all.count; });
  }
  call.shares.run(
      of.channels, threads,
      [&](int64_t c, int64_t first, int64_t last) {
        const int64_t at = c * groups + first;
        call.kernels.gradients[call.reduce](values + c * stride, call.of, first, last, grad + at, call.is_max ? output + at : nullptr, gradient + c * tokens);
      },
      [&](int64_t c, size_t i, int64_t, int64_t begin, int64_t end) {
        const int64_t at = c * groups + longs[i].group;
        call.kernels.gradient_piece[call.is_max](values + c * stride, call.of, begin, end, grad[at], by[(call.is_max ? c * longs.size() : 0) + i],
                                                 call.is_max ? static_cast<double>(output[at]) : 0.0, gradient + c * tokens);
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

const GroupKernels& group_kernels() { return ACPO_KERNELS(segment_reduce); }

void segment_reduce(const SegmentReduce& of, const void* values, Dtype dtype, int64_t channel_stride, void* out, int threads) {
  with_types(dtype, [&]<class T, class Out>(T*, Out*) {
    forward(of, dtype, static_cast<const T*>(values), channel_stride, static_cast<Out*>(out), threads);
  });
}

void segment_reduce_backward(const SegmentReduce& of, const void* grad, const void* values, Dtype dtype, int64_t channel_stride,
                             const void* output, void* gradient, int threads) {
  with_types(dtype, [&]<class T, class Out>(T*, Out*) {
    backward(of, dtype, static_cast<const Out*>(grad), static_cast<const T*>(values), channel_stride, static_cast<const Out*>(output),
             static_cast<T*>(gradient), threads);
  });
}

}  // namespace acpo
