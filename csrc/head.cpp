#include "head.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "head_kernels.h"
#include "isa.h"
#include "threads.h"

namespace acpo {
namespace {

constexpr int64_t BLOCK = 112;            // rows of W: 8 tiles of 14
constexpr int64_t SLICE = 36 * BLOCK;     // enough blocks that two or sixteen threads end together
constexpr int64_t SLICE_ROWS = SLICE + 3; // a panel's stride is no multiple of 4 KB, so that the panels of one row do not share L1 sets
constexpr int64_t UNIT = 8 * BLOCK;       // what one thread takes in the forward pass
constexpr int64_t GROUP_ROWS = 1024;      // rows whose logits of a slice are held: 16 MB
constexpr int64_t STRIP = 8;              // panels of rows in a piece of work for dHidden
constexpr double INFINITE = std::numeric_limits<double>::infinity();

const HeadKernels& head_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512:
      return head_avx512;
    case Isa::avx2:
      return head_avx2;
    case Isa::baseline:
      break;
  }
#else
  isa();
#endif
  return head_baseline;
}

int64_t panels(int64_t n) { return (n + PANEL - 1) / PANEL; }
int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
const void* at(const void* from, Dtype dtype, int64_t element) { return static_cast<const char*>(from) + element * size_of(dtype); }
void* at(void* from, Dtype dtype, int64_t element) { return static_cast<char*>(from) + element * size_of(dtype); }

std::atomic<int64_t> logits_rows{0}, hidden_rows{0}, weight_rows{0};

// The hidden states of the rows at work, as operands: `down` X^T in panels over the rows, `along` X in panels over H.
struct Hidden {
  Buffer down, along;

  Hidden(const Head& head, const HeadKernels& k, bool both, int threads)
      : down(panels(head.count) * PANEL * head.width), along(both ? panels(head.width) * PANEL * head.count : 0) {
    const int64_t wide = panels(head.width) * PANEL;
    parallel_for(panels(head.count), 1, threads, [&](int64_t begin, int64_t end) {
      Buffer row(wide);
      for (int64_t p = begin; p < end; ++p) {
        float* to = down.get() + p * PANEL * head.width;
        for (int64_t i = 0; i < PANEL; ++i) {
          const int64_t n = p * PANEL + i;
          if (n < head.count) {
            k.pack[static_cast<int>(head.dtype)](at(head.hidden, head.dtype, head.rows[n] * head.hidden_stride), 0, 1, head.width, row.get(),
                                                 PANEL);
          } else {
            std::fill_n(row.get(), wide, 0.0f);
          }
          for (int64_t h = 0; h < head.width; ++h) to[h * PANEL + i] = row.get()[h];
          if (!both || n >= head.count) continue;
          for (int64_t h = 0; h < wide; h += PANEL) std::copy_n(row.get() + h, PANEL, along.get() + (h * head.count + n * PANEL));
        }
      }
    });
  }
};

double temperature_of(const Head& head, int64_t row) { return head.temperatures == nullptr ? head.temperature : head.temperatures[row]; }

std::vector<LaneScales> lane_scales(const Head& head, bool fused) {
  std::vector<LaneScales> scales(panels(head.count));
  for (int64_t n = 0; n < panels(head.count) * PANEL; ++n) {
    set_scale(n < head.count ? temperature_of(head, head.rows[n]) : 1.0, fused, n % PANEL, &scales[n / PANEL]);
  }
  return scales;
}

int64_t lanes_of(int64_t count, int64_t panel) { return std::min(PANEL, count - panel * PANEL); }

// The sums of two parts of the vocabulary, against the larger of their maxima.
void merge(float top, double rest, double weighted, double inverse, float* to_top, double* to_rest, double* to_weighted) {
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

// Calls body(task, scratch) for every task, with scratch of its own for each thread.
template <class Body>
void parallel_tasks(int64_t tasks, int64_t scratch, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(tasks, threads), 1, threads, [&](int64_t, int64_t) {
    Buffer own(scratch);
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(t, own.get());
  });
}

void finish_rows(const Head& head, const std::vector<Lanes>& parts, int64_t units, const std::vector<LaneScales>& scales,
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

// The gradient of each row's logits but the target's; rows beyond `count` in the last panel get 0.
std::vector<LaneGradient> lane_gradients(const Head& head, const std::vector<LaneScales>& scales, const HeadStatistics& saved,
                                         const HeadGradient& out) {
  std::vector<LaneGradient> result(scales.size());
  for (int64_t n = 0; n < panels(head.count) * PANEL; ++n) {
    LaneGradient& g = result[n / PANEL];
    const int64_t lane = n % PANEL;
    g.a[lane] = g.b[lane] = 0.0f;
    g.top[lane] = std::numeric_limits<float>::max();
    if (n >= head.count) continue;
    const int64_t row = head.rows[n];
    const double l = saved.logsumexp[row], by_logp = out.grad_logp == nullptr ? 0.0 : out.grad_logp[row],
                 by_entropy = out.grad_entropy == nullptr ? 0.0 : out.grad_entropy[row];
    const double p_over_t = std::exp(-l) * scales[n / PANEL].inverse[lane];
    g.top[lane] = saved.maximum[row];
    g.a[lane] = static_cast<float>(p_over_t * (by_entropy * (l - saved.entropy[row]) - by_logp));
    g.b[lane] = static_cast<float>(-p_over_t * by_entropy * 0.6931471805599453);
  }
  return result;
}

float target_gradient(const Head& head, const HeadStatistics& saved, const HeadGradient& out, int64_t row, double inverse, float z) {
  const double l = saved.logsumexp[row], d = (static_cast<double>(z) - saved.maximum[row]) * inverse, p = std::exp(d - l);
  double g = out.grad_logp == nullptr ? 0.0 : -static_cast<double>(out.grad_logp[row]) * std::expm1(d - l);
  if (p > 0.0 && out.grad_entropy != nullptr) g += out.grad_entropy[row] * p * (l - d - saved.entropy[row]);
  if (l != l) g = l;
  const double r = head.softcap > 0.0 ? z / head.softcap : 0.0;
  return static_cast<float>(g * inverse * (1.0 - r * r));
}

}  // namespace

int64_t head_logits_size(int64_t vocab, int64_t count) { return vocab * panels(count) * PANEL; }

HeadWork head_work() { return {logits_rows.load(), hidden_rows.load(), weight_rows.load()}; }

void head_forward(const Head& head, float* logits, const HeadStatistics& out, int threads) {
  if (head.count == 0) return;
  const HeadKernels& k = head_kernels();
  const Hidden hidden(head, k, false, threads);
  const std::vector<LaneScales> scales = lane_scales(head, k.fused);
  const int64_t wide = panels(head.count), units = (head.vocab + UNIT - 1) / UNIT, block_floats = panels(head.width) * PANEL * BLOCK;
  std::vector<Lanes> parts(units * wide);
  std::vector<float> target(head.count);
  parallel_tasks(units, block_floats + BLOCK * PANEL, threads, [&](int64_t unit, float* scratch) {
    Lanes* state = parts.data() + unit * wide;
    for (int64_t p = 0; p < wide; ++p) {
      std::fill_n(state[p].top, PANEL, -std::numeric_limits<float>::infinity());
      std::fill_n(state[p].rest, PANEL, 0.0);
      std::fill_n(state[p].weighted, PANEL, 0.0);
    }
    const int64_t last = std::min(head.vocab, (unit + 1) * UNIT);
    for (int64_t v = unit * UNIT; v < last; v += BLOCK) {
      const int64_t rows = std::min(BLOCK, last - v);
      k.pack[static_cast<int>(head.dtype)](at(head.weight, head.dtype, v * head.weight_stride), head.weight_stride, rows, head.width, scratch,
                                           BLOCK * PANEL);
      for (int64_t p = 0; p < wide; ++p) {
        const int64_t lanes = lanes_of(head.count, p);
        float* z = logits == nullptr ? scratch + block_floats : logits + (p * head.vocab + v) * PANEL;
        k.logits(scratch, BLOCK * PANEL, rows, head.width, hidden.down.get() + p * PANEL * head.width, lanes, z);
        if (head.bias != nullptr || head.softcap > 0.0) {
          k.finish(z, rows, lanes, head.bias == nullptr ? nullptr : head.bias + v, static_cast<float>(head.softcap));
        }
        k.statistics(z, rows, lanes, scales[p], state + p);
        for (int64_t i = 0; i < lanes; ++i) {
          const int64_t id = head.ids[head.rows[p * PANEL + i]] - v;
          if (id >= 0 && id < rows) target[p * PANEL + i] = z[id * PANEL + i];
        }
      }
    }
  });
  logits_rows += head.count;
  finish_rows(head, parts, units, scales, target, out);
}

void head_backward(const Head& head, float* logits, const HeadStatistics& saved, const HeadGradient& out, int threads) {
  const bool direct = out.weight != nullptr && out.weight_dtype == Dtype::float32;
  if (head.count == 0) {
    if (out.weight != nullptr && !out.add) std::memset(out.weight, 0, static_cast<size_t>(head.vocab * head.width * size_of(out.weight_dtype)));
    if (out.bias != nullptr && !out.add) std::fill_n(out.bias, head.vocab, 0.0f);
    return;
  }
  const HeadKernels& k = head_kernels();
  const Hidden hidden(head, k, out.weight != nullptr, threads);
  const std::vector<LaneScales> scales = lane_scales(head, k.fused);
  const std::vector<LaneGradient> gradients = lane_gradients(head, scales, saved, out);
  const int64_t wide = panels(head.count), tall = panels(head.width);
  const Buffer slice_weight(tall * PANEL * SLICE_ROWS);
  const Buffer slice_logits(logits != nullptr ? 0 : std::min(wide, GROUP_ROWS / PANEL) * PANEL * SLICE_ROWS);
  const Buffer slice_gradient(out.weight != nullptr && !direct ? SLICE * head.width : 0);
  const Buffer grad_hidden(out.hidden != nullptr ? tall * wide * PANEL * PANEL : 0);  // tile (h, n): [32 n][32 h]
  if (out.hidden != nullptr) std::fill_n(grad_hidden.get(), tall * wide * PANEL * PANEL, 0.0f);

  for (int64_t begin = 0; begin < head.vocab; begin += SLICE) {
    const int64_t size = std::min(SLICE, head.vocab - begin);
    for (int64_t group = 0; group < wide; group += GROUP_ROWS / PANEL) {
      const int64_t end = std::min(wide, group + GROUP_ROWS / PANEL), count = std::min(head.count, end * PANEL) - group * PANEL;
      float* const base = logits == nullptr ? slice_logits.get() : logits + (group * head.vocab + begin) * PANEL;
      const int64_t stride = (logits == nullptr ? SLICE_ROWS : head.vocab) * PANEL;
      const bool add = out.add || group > 0;
      // Per block: the gradient of its logits, and dW
      parallel_for((size + BLOCK - 1) / BLOCK, 1, threads, [&](int64_t block, int64_t) {
        const int64_t from = block * BLOCK, v = begin + from, rows = std::min(BLOCK, size - from);
        float* const weight = slice_weight.get() + from * PANEL;
        if (group == 0) {
          k.pack[static_cast<int>(head.dtype)](at(head.weight, head.dtype, v * head.weight_stride), head.weight_stride, rows, head.width,
                                               weight, SLICE_ROWS * PANEL);
        }
        if (out.bias != nullptr && !add) std::fill_n(out.bias + v, rows, 0.0f);
        for (int64_t p = group; p < end; ++p) {
          const int64_t lanes = lanes_of(head.count, p);
          float* z = base + (p - group) * stride + from * PANEL;
          if (logits == nullptr) {
            k.logits(weight, SLICE_ROWS * PANEL, rows, head.width, hidden.down.get() + p * PANEL * head.width, lanes, z);
            if (head.bias != nullptr || head.softcap > 0.0) {
              k.finish(z, rows, lanes, head.bias == nullptr ? nullptr : head.bias + v, static_cast<float>(head.softcap));
            }
          }
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
        if (out.weight == nullptr) return;
        for (int64_t h = 0; h < tall; ++h) {
          float* to = (direct ? static_cast<float*>(out.weight) + v * head.width : slice_gradient.get() + from * head.width) + h * PANEL;
          k.weight(base + from * PANEL, stride, rows, hidden.along.get() + (h * head.count + group * PANEL) * PANEL, count, to, head.width,
                   std::min(PANEL, head.width - h * PANEL), add);
        }
        if (!direct && end == wide) {
          k.round[static_cast<int>(out.weight_dtype)](slice_gradient.get() + from * head.width, rows * head.width,
                                                      at(out.weight, out.weight_dtype, v * head.width));
        }
      });
      // Per slice: dHidden, two panels over H and STRIP panels of rows at a time
      if (out.hidden == nullptr) continue;
      const int64_t strips = (end - group + STRIP - 1) / STRIP, pairs = (tall + 1) / 2;
      parallel_for(strips * pairs, 1, threads, [&](int64_t task, int64_t) {
        const int64_t first = group + task / pairs * STRIP, last = std::min(end, first + STRIP), h = task % pairs * 2;
        for (int64_t v = 0; v < size; v += CHUNK) {
          for (int64_t j = h; j < std::min(tall, h + 2); ++j) {
            for (int64_t p = first; p < last; ++p) {
              k.hidden(base + (p - group) * stride + v * PANEL, slice_weight.get() + (j * SLICE_ROWS + v) * PANEL, std::min(CHUNK, size - v),
                       lanes_of(head.count, p), grad_hidden.get() + (j * wide + p) * PANEL * PANEL);
            }
          }
        }
      });
    }
  }
  if (logits == nullptr) logits_rows += head.count;
  if (out.weight != nullptr) weight_rows += head.count;
  if (out.hidden == nullptr) return;
  hidden_rows += head.count;
  parallel_for(head.count, PANEL, threads, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      for (int64_t h = 0; h < tall; ++h) {
        k.round[static_cast<int>(out.hidden_dtype)](grad_hidden.get() + ((h * wide + n / PANEL) * PANEL + n % PANEL) * PANEL,
                                              std::min(PANEL, head.width - h * PANEL),
                                              at(out.hidden, out.hidden_dtype, head.rows[n] * head.width + h * PANEL));
      }
    }
  });
}

}  // namespace acpo
