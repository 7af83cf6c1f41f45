#include "head.h"

#include <cstring>

#include "head_parts.h"

namespace acpo {
namespace {

constexpr int64_t GROUP_ROWS = 1024;      // rows whose logits of a slice are held: 16 MB
constexpr int64_t STRIP = 8;              // panels of rows in a piece of work for dHidden

std::atomic<int64_t> logits_rows{0}, hidden_rows{0}, weight_rows{0};

void forward_rows(const Head& head, float* logits, const HeadStatistics& out, int threads) {
  const HeadKernels& k = head_kernels();
  const Logits product(head, k, nullptr, threads);
  const std::vector<LaneScales> scales = lane_scales(head, k.fused);
  const int64_t wide = panels(head.count), units = (head.vocab + UNIT - 1) / UNIT, block_floats = product.block_size();
  std::vector<Lanes> parts(units * wide);
  std::vector<float> target(head.count);
  parallel_tasks(units, block_floats + BLOCK * PANEL, threads, [&](int64_t unit, float* scratch) {
    Lanes* state = parts.data() + unit * wide;
    for (int64_t p = 0; p < wide; ++p) begin_lanes(state + p);
    const int64_t last = std::min(head.vocab, (unit + 1) * UNIT);
    for (int64_t v = unit * UNIT; v < last; v += BLOCK) {
      const int64_t rows = std::min(BLOCK, last - v);
      product.pack(v, rows, scratch);
      for (int64_t p = 0; p < wide; ++p) {
        const int64_t lanes = lanes_of(head.count, p);
        float* z = logits == nullptr ? scratch + block_floats : logits + (p * head.vocab + v) * PANEL;
        product(scratch, Logits::STRIDE, v, rows, p, z, v + rows, 0, wide);
        k.statistics(z, rows, lanes, scales[p], state + p);
        for (int64_t i = 0; i < lanes; ++i) {
          const int64_t id = head.ids[head.rows[p * PANEL + i]] - v;
          if (id >= 0 && id < rows) target[p * PANEL + i] = z[id * PANEL + i];
        }
      }
    }
  });
  count_work({head.count, 0, 0});
  finish_rows(head, parts, units, scales, target, out);
}

}  // namespace

void count_work(const HeadWork& rows) {
  logits_rows += rows.logits;
  hidden_rows += rows.hidden;
  weight_rows += rows.weight;
}

int64_t head_logits_size(int64_t vocab, int64_t count) { return vocab * panels(count) * PANEL; }

HeadWork head_work() { return {logits_rows.load(), hidden_rows.load(), weight_rows.load()}; }

void head_forward(const Head& head, float* logits, const HeadStatistics& out, int threads) {
  for_some_rows(head, [&](const Head& part, int64_t first) {
    forward_rows(part, logits == nullptr ? nullptr : logits + head_logits_size(head.vocab, first), out, threads);
  });
}

void head_backward(const Head& head, const float* logits, const HeadStatistics& saved, const HeadGradient& out, int threads) {
  const bool with_weight = out.weight != nullptr || out.sum != nullptr;
  if (head.count == 0) {
    if (out.weight != nullptr && !out.add) std::memset(out.weight, 0, static_cast<size_t>(head.vocab * head.width * size_of(out.weight_dtype)));
    if (out.bias != nullptr && !out.add) std::fill_n(out.bias, head.vocab, 0.0f);
    return;
  }
  count_work({logits == nullptr ? head.count : 0, out.hidden != nullptr ? head.count : 0, with_weight ? head.count : 0});
  if (const HeadWords* const words = head_words(head)) return words_backward(*words, head, logits, saved, out, threads);
  const HeadKernels& k = head_kernels();
  float* const sum = sum_of(out);
  const Buffer along(with_weight ? panels(head.width) * PANEL * head.count : 0);  // X in panels over H
  const Logits product(head, k, with_weight ? along.get() : nullptr, threads);
  const std::vector<LaneScales> scales = lane_scales(head, k.fused);
  const std::vector<LaneGradient> gradients = lane_gradients(head, scales, saved, out);
  const int64_t wide = panels(head.count), tall = panels(head.width);
  const Buffer slice_weight(tall * PANEL * SLICE_ROWS);
  const Buffer slice_logits(std::min(wide, GROUP_ROWS / PANEL) * PANEL * SLICE_ROWS);
  const Buffer slice_gradient(with_weight && sum == nullptr && wide > GROUP_ROWS / PANEL ? SLICE * head.width : 0);
  const Buffer grad_hidden(out.hidden != nullptr ? tall * wide * PANEL * PANEL : 0);  // tile (h, n): [32 n][32 h]
  if (out.hidden != nullptr) std::fill_n(grad_hidden.get(), tall * wide * PANEL * PANEL, 0.0f);

  for (int64_t begin = 0; begin < head.vocab; begin += SLICE) {
    const int64_t size = std::min(SLICE, head.vocab - begin);
    for (int64_t group = 0; group < wide; group += GROUP_ROWS / PANEL) {
      const int64_t end = std::min(wide, group + GROUP_ROWS / PANEL), count = std::min(head.count, end * PANEL) - group * PANEL;
      float* const base = slice_logits.get();
      constexpr int64_t stride = SLICE_ROWS * PANEL;
      const bool add = out.add || group > 0;
      // Per block: the gradient of its logits, and dW
      parallel_tasks((size + BLOCK - 1) / BLOCK, with_weight ? BLOCK * head.width : 0, threads, [&](int64_t block, float* part) {
        const int64_t from = block * BLOCK, v = begin + from, rows = std::min(BLOCK, size - from);
        const int64_t next = v + threads * BLOCK;  // what this thread takes on next, most likely
        float* const weight = slice_weight.get() + from * PANEL;
        if (group == 0 && (out.hidden != nullptr || logits == nullptr)) {
          k.pack[static_cast<int>(head.dtype)](weight_at(head, v), head.weight_stride, rows, head.width, weight, SLICE_ROWS * PANEL);
        }
        if (out.bias != nullptr && !add) std::fill_n(out.bias + v, rows, 0.0f);
        for (int64_t p = group; p < end; ++p) {
          float* z = base + (p - group) * stride + from * PANEL;
          if (logits == nullptr) {
            product(weight, SLICE_ROWS * PANEL, v, rows, p, z, next, group, end);
          } else {
            take_logits(head, logits, v, rows, p, p + 1 < end ? v : next, p + 1 < end ? p + 1 : group, z);
          }
          gradient_of_block(head, k, saved, out, scales, gradients, v, rows, p, z);
        }
        if (!with_weight) return;
        for (int64_t h = 0; h < tall; ++h) {
          if (logits != nullptr) fetch_weight(head, next, h, tall);
          k.weight(base + from * PANEL, stride, rows, along.get() + (h * head.count + group * PANEL) * PANEL, count, part + h * PANEL, head.width,
                   std::min(PANEL, head.width - h * PANEL));
        }
        leave_weight(head, k, out, v, rows, part, sum != nullptr ? sum + v * head.width : slice_gradient.get() + from * head.width, add, end == wide);
      });
      // Per slice: dHidden, two panels over H and STRIP panels of rows at a time
      if (out.hidden == nullptr) continue;
      const int64_t strips = (end - group + STRIP - 1) / STRIP, pairs = (tall + 1) / 2;
      parallel_for(strips * pairs, 1, threads, [&](int64_t task, int64_t) {
        const int64_t first = group + task / pairs * STRIP, last = std::min(end, first + STRIP), h = task % pairs * 2;
        for (int64_t v = 0; v < size; v += CHUNK_HIDDEN) {
          for (int64_t j = h; j < std::min(tall, h + 2); ++j) {
            for (int64_t p = first; p < last; ++p) {
              k.hidden(base + (p - group) * stride + v * PANEL, slice_weight.get() + (j * SLICE_ROWS + v) * PANEL, std::min(CHUNK_HIDDEN, size - v),
                       lanes_of(head.count, p), grad_hidden.get() + (j * wide + p) * PANEL * PANEL);
            }
          }
        }
      });
    }
  }
  if (out.hidden == nullptr) return;
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

void head_round(const Head& head, const float* sum, void* weight, int threads) {
  const HeadKernels& k = head_kernels();
  parallel_for(head.vocab, BLOCK, threads, [&](int64_t begin, int64_t end) {
    k.round[static_cast<int>(head.dtype)](sum + begin * head.width, (end - begin) * head.width, at(weight, head.dtype, begin * head.width));
  });
}

}  // namespace acpo
