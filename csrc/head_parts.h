// What the passes over the head share: memory, operands, and the statistics of parts of the vocabulary.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "buffer.h"
#include "floats.h"
#include "head.h"
#include "head_kernels.h"
#include "isa.h"
#include "threads.h"

namespace acpo {

void count_work(const HeadWork& rows);

// head_backward for a head whose products are of words.
void words_backward(const HeadWords& with, const Head& head, const float* logits, const HeadStatistics& saved, const HeadGradient& out, int threads);

namespace {

constexpr int64_t BLOCK = 112;            // rows of W: 8 tiles of 14
constexpr int64_t SLICE = 36 * BLOCK;     // enough blocks that two or sixteen threads end together
constexpr int64_t SLICE_ROWS = SLICE + 3; // a panel's stride is no multiple of 4 KB, so that the panels of one row do not share L1 sets
constexpr int64_t UNIT = 8 * BLOCK;       // what one thread takes in the forward pass
constexpr double INFINITE = std::numeric_limits<double>::infinity();

inline const HeadKernels& head_kernels() { return ACPO_KERNELS(head); }

inline int64_t panels(int64_t n) { return (n + PANEL - 1) / PANEL; }
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
inline void* at(void* from, Dtype dtype, int64_t element) { return static_cast<char*>(from) + element * size_of(dtype); }
inline const void* at(const void* from, Dtype dtype, int64_t element) { return static_cast<const char*>(from) + element * size_of(dtype); }

inline int64_t lanes_of(int64_t count, int64_t panel) { return std::min(PANEL, count - panel * PANEL); }
inline const void* weight_at(const Head& head, int64_t v) { return at(head.weight, head.dtype, v * head.weight_stride); }

// The products from bf16, on tiles or in pairs where the processor has them; null: all products are float32.
inline const HeadWords* head_words(const Head& head) {
#if defined(__x86_64__)
  if (head.dtype == Dtype::bfloat16 && has_tiles()) return &head_tiles;
  if (head.dtype == Dtype::bfloat16 && has_pairs()) return &head_pairs;
#endif
  (void)head;
  return nullptr;
}

// The hidden states of the rows at work as an operand of the logits (X^T in panels over the rows), and the product itself.
class Logits {
 public:
  // Elements between the panels of a packed block: no multiple of 2 KB, so that the panels of one row do not share L1 sets.
  static constexpr int64_t STRIDE = (BLOCK + 1) * PANEL;

  // `along`, if not null, is filled with X in panels over H; of words each of panels(N) panels of B.
  Logits(const Head& head, const HeadKernels& k, float* along, int threads)
      : words_(head_words(head)),
        head_(head),
        k_(k),
        wide_(panels(head.width) * PANEL),
        down_(panels(head.count) * PANEL * (words_ != nullptr ? wide_ / 2 : head.width)) {
    parallel_for(panels(head.count), 1, threads, [&](int64_t begin, int64_t end) {
      Buffer row(wide_);
      for (int64_t n = begin * PANEL; n < end * PANEL; ++n) {
        if (n < head.count) {
          const void* from = at(head.hidden, head.dtype, head.rows[n] * head.hidden_stride);
          k.pack[static_cast<int>(head.dtype)](from, 0, 1, head.width, row.get(), PANEL);
        } else {
          std::fill_n(row.get(), wide_, 0.0f);
        }
        place(row.get(), n);
        if (along == nullptr) continue;
        if (words_ != nullptr) {
          for (int64_t h = 0; h < wide_; ++h) {
            uint16_t* to = reinterpret_cast<uint16_t*>(along) + (h / PANEL * panels(head.count) + n / PANEL) * TILE_B;
            to[(n % PANEL / 2 * PANEL + h % PANEL) * 2 + n % 2] = bits_of(row.get()[h]);
          }
          continue;
        }
        if (n >= head.count) continue;
        for (int64_t h = 0; h < wide_; h += PANEL) std::copy_n(row.get() + h, PANEL, along + (h * head.count + n * PANEL));
      }
    });
  }

  // Floats that a packed block of W takes.
  int64_t block_size() const { return wide_ / PANEL * STRIDE; }

  void pack(int64_t v, int64_t rows, float* block) const {
    if (words_ != nullptr) {
      words_->pack(static_cast<const uint16_t*>(weight_at(head_, v)), head_.weight_stride, rows, head_.width, reinterpret_cast<uint16_t*>(block), STRIDE);
      return;
    }
    k_.pack[static_cast<int>(head_.dtype)](weight_at(head_, v), head_.weight_stride, rows, head_.width, block, STRIDE);
  }

  // The finished logits of entries v to v + rows and the rows of panel p. `stride`: elements between the panels of the block. The block
  // of entry `after` is fetched meanwhile, in shares of the panels [first, end).
  void operator()(const float* block, int64_t stride, int64_t v, int64_t rows, int64_t p, float* z, int64_t after, int64_t first,
                  int64_t end) const {
    const Ahead next = share(after, p - first, end - first);
    const int64_t lanes = lanes_of(head_.count, p);
    if (words_ != nullptr) {
      words_->logits(reinterpret_cast<const uint16_t*>(block), stride, rows, head_.width, reinterpret_cast<const uint16_t*>(down_.get()) + p * PANEL * wide_,
                     lanes, z, next);
    } else {
      k_.logits(block, stride, rows, head_.width, down_.get() + p * PANEL * head_.width, lanes, z, next);
    }
    if (head_.bias == nullptr && !(head_.softcap > 0.0)) return;
    k_.finish(z, rows, lanes, head_.bias == nullptr ? nullptr : head_.bias + v, static_cast<float>(head_.softcap));
  }

 private:
  // Part `i` of `parts` of the BLOCK rows of W from v on; nothing where they do not lie together.
  Ahead share(int64_t v, int64_t i, int64_t parts) const {
    const int64_t rows = std::min(BLOCK, head_.vocab - v);
    if (rows <= 0 || head_.weight_stride != head_.width) return {};
    const int64_t lines = rows * head_.width * size_of(head_.dtype) / 64, begin = lines * i / parts;
    return {static_cast<const char*>(weight_at(head_, v)) + begin * 64, lines * (i + 1) / parts - begin};
  }

  void place(const float* row, int64_t n) {
    const int64_t p = n / PANEL, i = n % PANEL;
    if (words_ == nullptr) {
      float* to = down_.get() + p * PANEL * head_.width;
      for (int64_t h = 0; h < head_.width; ++h) to[h * PANEL + i] = row[h];
      return;
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(down_.get()) + p * PANEL * wide_;
    for (int64_t h = 0; h < wide_; ++h) to[(h / 2 * PANEL + i) * 2 + h % 2] = bits_of(row[h]);
  }

  static uint16_t bits_of(float x) {  // exact: it came from bf16
    bf16 value;
    from_float(x, &value);
    return value.bits;
  }

  const HeadWords* const words_;
  const Head& head_;
  const HeadKernels& k_;
  const int64_t wide_;
  const Buffer down_;
};

inline double temperature_of(const Head& head, int64_t row) { return head.temperatures == nullptr ? head.temperature : head.temperatures[row]; }

inline std::vector<LaneScales> lane_scales(const Head& head, bool fused) {
  std::vector<LaneScales> scales(panels(head.count));
  for (int64_t n = 0; n < panels(head.count) * PANEL; ++n) {
    set_scale(n < head.count ? temperature_of(head, head.rows[n]) : 1.0, fused, n % PANEL, &scales[n / PANEL]);
  }
  return scales;
}

// The sums of two parts of the vocabulary, against the larger of their maxima.
inline void merge(float top, double rest, double weighted, double inverse, float* to_top, double* to_rest, double* to_weighted) {
  if (top != top || !(top > -INFINITE)) {
    *to_rest += rest;  // 0, or NaN where the part held one
    return;
  }
  if (top > *to_top) {
    std::swap(top, *to_top);
    std::swap(rest, *to_rest);
    std::swap(weighted, *to_weighted);
    if (!(top > -INFINITE)) {
      *to_rest += rest;
      return;
    }
  }
  const double d = (static_cast<double>(*to_top) - top) * inverse, e = std::exp(-d);
  *to_rest += e > 0.0 ? (1.0 + rest) * e : rest != rest ? rest : 0.0;
  *to_weighted += e > 0.0 ? e * (weighted + (1.0 + rest) * d) : 0.0;
}

// The rows in parts of PART_ROWS: what is kept of the units of the vocabulary, 2 KB for 32 rows of a unit, stays below 60 MB.
constexpr int64_t PART_ROWS = 4096;
template <class Body>
void for_some_rows(const Head& head, const Body& body) {
  for (int64_t first = 0; first < head.count; first += PART_ROWS) {
    Head part = head;
    part.rows += first;
    part.count = std::min(PART_ROWS, head.count - first);
    body(part, first);
  }
}

// Calls body(task, scratch) for every task, with scratch of its own for each thread.
template <class Body>
void parallel_tasks(int64_t tasks, int64_t scratch, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(tasks, threads), 1, threads, [&](int64_t, int64_t) {
    Buffer own(scratch);
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(t, own.get());
  });
}

inline void begin_lanes(Lanes* state) {
  std::fill_n(state->top, PANEL, -std::numeric_limits<float>::infinity());
  std::fill_n(state->rest, PANEL, 0.0);
  std::fill_n(state->weighted, PANEL, 0.0);
}

// The statistics of row head.rows[n] from those of the units of the vocabulary, in their order.
inline void finish_rows(const Head& head, const std::vector<Lanes>& parts, int64_t units, const std::vector<LaneScales>& scales,
                 const std::vector<float>& target, const HeadStatistics& out) {
  const int64_t wide = panels(head.count);
  for (int64_t n = 0; n < head.count; ++n) {
    const int64_t p = n / PANEL, lane = n % PANEL, row = head.rows[n];
    const double inverse = scales[p].inverse[lane];
    float top = -std::numeric_limits<float>::infinity();
    double rest = 0.0, weighted = 0.0;
    for (int64_t u = 0; u < units; ++u) {
      const Lanes& part = parts[u * wide + p];
      merge(part.top[lane], part.rest[lane], part.weighted[lane], inverse, &top, &rest, &weighted);
    }
    if (!(top > -INFINITE && top < INFINITE) || rest != rest || weighted != weighted) {
      out.logp[row] = out.entropy[row] = out.maximum[row] = out.logsumexp[row] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    const double l = std::log1p(rest);
    out.logp[row] = static_cast<float>((static_cast<double>(target[n]) - top) * inverse - l);
    out.entropy[row] = static_cast<float>(l + weighted / (1.0 + rest));
    out.maximum[row] = top;
    out.logsumexp[row] = static_cast<float>(l);
  }
}

// Where dWeight is summed in float32, if it is anywhere.
inline float* sum_of(const HeadGradient& out) {
  return out.sum == nullptr && out.weight_dtype == Dtype::float32 ? static_cast<float*>(out.weight) : out.sum;
}

// dWeight of the entries v to v + rows goes where it is wanted: `part` holds what one group of rows gives to it, `sum` (if any) what those
// before gave where `add`. The last one may round it.
inline void leave_weight(const Head& head, const HeadKernels& k, const HeadGradient& out, int64_t v, int64_t rows, float* part, float* sum, bool add,
                         bool last) {
  const int64_t count = rows * head.width;
  if (add) {
    for (int64_t i = 0; i < count; ++i) part[i] += sum[i];
  }
  if (last && out.weight != nullptr && out.weight_dtype != Dtype::float32) {
    k.leave[static_cast<int>(out.weight_dtype)](part, count, at(out.weight, out.weight_dtype, v * head.width));
  } else {
    k.leave[static_cast<int>(Dtype::float32)](part, count, sum);
  }
}

// Into the L2, while something else is computed.
inline void fetch_ahead(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// Part `i` of `parts` of the BLOCK rows of W from v on.
inline void fetch_weight(const Head& head, int64_t v, int64_t i, int64_t parts) {
  const int64_t rows = std::min(BLOCK, head.vocab - v), begin = rows * i / parts, end = rows * (i + 1) / parts;
  for (int64_t row = begin; row < end; ++row) fetch_ahead(weight_at(head, v + row), head.width * size_of(head.dtype));
}

// The logits of one panel and block that forward left; those of entry `after` in panel `next` are fetched meanwhile.
inline void take_logits(const Head& head, const float* logits, int64_t v, int64_t rows, int64_t p, int64_t after, int64_t next, float* z) {
  const int64_t coming = std::min(BLOCK, head.vocab - after);
  if (coming > 0) fetch_ahead(logits + (next * head.vocab + after) * PANEL, coming * PANEL * static_cast<int64_t>(sizeof(float)));
  std::copy_n(logits + (p * head.vocab + v) * PANEL, rows * PANEL, z);
}

// The gradient of each row's logits but the target's; rows beyond `count` in the last panel get 0.
inline std::vector<LaneGradient> lane_gradients(const Head& head, const std::vector<LaneScales>& scales, const HeadStatistics& saved,
                                         const HeadGradient& out) {
  std::vector<LaneGradient> result(scales.size());
  for (int64_t n = 0; n < panels(head.count) * PANEL; ++n) {
    LaneGradient& g = result[n / PANEL];
    const int64_t lane = n % PANEL;
    g.a[lane] = g.b[lane] = 0.0f;
    g.top[lane] = g.keep[lane] = std::numeric_limits<float>::max();
    if (n >= head.count) continue;
    const int64_t row = head.rows[n];
    const double l = saved.logsumexp[row], by_logp = out.grad_logp == nullptr ? 0.0 : out.grad_logp[row],
                 by_entropy = out.grad_entropy == nullptr ? 0.0 : out.grad_entropy[row];
    const double p_over_t = std::exp(-l) * scales[n / PANEL].inverse[lane];
    g.top[lane] = saved.maximum[row];
    g.a[lane] = static_cast<float>(p_over_t * (by_entropy * (l - saved.entropy[row]) - by_logp));
    g.b[lane] = static_cast<float>(-p_over_t * by_entropy * 0.6931471805599453);
    // The sizes of the elements beside target and top add up to twice `size` at most: no more than 512 of them are kept
    const double size = (std::fabs(by_logp) * -std::expm1(-l) + std::fabs(by_entropy) * saved.entropy[row]) * scales[n / PANEL].inverse[lane];
    g.keep[lane] = std::max(static_cast<float>(0x1p-8 * size), std::numeric_limits<float>::min());
  }
  return result;
}

inline float target_gradient(const Head& head, const HeadStatistics& saved, const HeadGradient& out, int64_t row, double inverse, float z) {
  const double l = saved.logsumexp[row], d = (static_cast<double>(z) - saved.maximum[row]) * inverse, p = std::exp(d - l);
  double g = out.grad_logp == nullptr ? 0.0 : -static_cast<double>(out.grad_logp[row]) * std::expm1(d - l);
  if (p > 0.0 && out.grad_entropy != nullptr) g += out.grad_entropy[row] * p * (l - d - saved.entropy[row]);
  if (l != l) g = l;
  const double r = head.softcap > 0.0 ? z / head.softcap : 0.0;
  return static_cast<float>(g * inverse * (1.0 - r * r));
}

// The logits of one panel and block, turned into their gradient; its sums over rows go to the bias.
inline void gradient_of_block(const Head& head, const HeadKernels& k, const HeadStatistics& saved, const HeadGradient& out,
                              const std::vector<LaneScales>& scales, const std::vector<LaneGradient>& gradients, int64_t v, int64_t rows,
                              int64_t p, float* z) {
  const int64_t lanes = lanes_of(head.count, p);
  float target[PANEL];
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t row = head.rows[p * PANEL + i], id = head.ids[row] - v;
    if (id >= 0 && id < rows) target[i] = target_gradient(head, saved, out, row, scales[p].inverse[i], z[id * PANEL + i]);
  }
  k.gradient(z, rows, lanes, scales[p], gradients[p], static_cast<float>(head.softcap));
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t id = head.ids[head.rows[p * PANEL + i]] - v;
    if (id >= 0 && id < rows) z[id * PANEL + i] = target[i];
  }
  if (out.bias != nullptr) k.bias(z, rows, lanes, out.bias + v);
}

}  // namespace
}  // namespace acpo
