// head_backward from bf16 on AMX: the walk of head.cpp with the operands of head_kernels.h' HeadTiles. The gradient of the logits is
// split where it is in the L1, into the operand of dW, which stays in the L2, and that of dHidden, held for a slice.
#include <algorithm>

#include "head_parts.h"

namespace acpo {
namespace {

constexpr int64_t GROUP_ROWS = 1024;  // rows whose gradients of a slice are held: 25 MB
constexpr int64_t STRIP = 8;          // panels of rows in a piece of work for dHidden,
constexpr int64_t HEIGHT = 64;        // by this many h: 16 panels of k are 64 KB of W^T, in the L2 while the rows pass
constexpr int64_t DEPTH = 16;         // panels of k
constexpr int64_t SLICE_PANELS = SLICE / PANEL;

uint16_t* words(float* p) { return reinterpret_cast<uint16_t*>(p); }

}  // namespace

void tiles_backward(const Head& head, float* logits, const HeadStatistics& saved, const HeadGradient& out, int threads) {
  const HeadKernels& k = head_kernels();
  const int64_t wide = panels(head.count), tall = panels(head.width), most = std::min(wide, GROUP_ROWS / PANEL);
  const int64_t height = (head.width + 15) / 16 * 16;
  const bool with_weight = out.weight != nullptr, with_hidden = out.hidden != nullptr, direct = out.weight_dtype == Dtype::float32;
  const Buffer along(with_weight ? tall * wide * TILE_B / 2 : 0);
  const Logits product(head, k, with_weight ? along.get() : nullptr, threads);
  const std::vector<LaneScales> scales = lane_scales(head, k.fused);
  const std::vector<LaneGradient> gradients = lane_gradients(head, scales, saved, out);
  const Buffer turned(with_hidden ? SLICE_PANELS * height * PANEL / 2 : 0);                  // W^T of a slice: panels over v, [h][32]
  const Buffer held(with_hidden ? PARTS * most * SLICE_PANELS * TILE_B / 2 : 0);             // G of a slice: (part, n), panels over v
  const Buffer slice_gradient(with_weight && !direct ? SLICE * head.width : 0);
  const Buffer grad_hidden(with_hidden ? wide * head.width * PANEL : 0);                     // (n), [h][32]
  if (with_hidden) std::fill_n(grad_hidden.get(), wide * head.width * PANEL, 0.0f);
  const auto held_at = [&](int part, int64_t p) { return words(held.get()) + (part * most + p) * SLICE_PANELS * TILE_B; };

  for (int64_t begin = 0; begin < head.vocab; begin += SLICE) {
    const int64_t size = std::min(SLICE, head.vocab - begin), blocks = (size + BLOCK - 1) / BLOCK;
    for (int64_t group = 0; group < wide; group += most) {
      const int64_t end = std::min(wide, group + most), count = std::min(head.count, end * PANEL) - group * PANEL;
      const bool add = out.add || group > 0;
      const int64_t parts_size = PARTS * most * BLOCK * PANEL / 2;
      parallel_tasks(blocks, product.block_size() + 2 * BLOCK * PANEL + parts_size, threads, [&](int64_t block, float* scratch) {
        const int64_t from = block * BLOCK, v = begin + from, rows = std::min(BLOCK, size - from);
        const int64_t whole = block + 1 < blocks ? rows : panels(size) * PANEL - from;
        float *const own = scratch + product.block_size(), *const sum = own + BLOCK * PANEL;
        uint16_t* const split = words(sum + BLOCK * PANEL);
        if (logits == nullptr) product.pack(v, rows, scratch);
        if (with_hidden && group == 0) {
          for (int64_t p = panels(from); p * PANEL < from + rows; ++p) {  // the panels of the slice that begin in this block
            head_tiles.transpose(static_cast<const uint16_t*>(weight_at(head, begin + p * PANEL)), head.weight_stride,
                                 std::min(PANEL, size - p * PANEL), head.width, words(turned.get()) + p * height * PANEL);
          }
        }
        if (out.bias != nullptr && !add) std::fill_n(out.bias + v, rows, 0.0f);
        for (int64_t p = group; p < end; ++p) {
          float* const z = logits == nullptr ? own : logits + (p * head.vocab + v) * PANEL;
          if (logits == nullptr) product(scratch, Logits::STRIDE, v, rows, p, z, v + threads * BLOCK, group, end);
          gradient_of_block(head, k, saved, out, scales, gradients, v, rows, p, z);
          uint16_t *as_a[PARTS], *as_b[PARTS];
          for (int part = 0; part < PARTS; ++part) {
            as_a[part] = with_weight ? split + (part * most + p - group) * BLOCK * PANEL : nullptr;
            as_b[part] = with_hidden ? held_at(part, p - group) : nullptr;
          }
          head_tiles.split(z, rows, whole, lanes_of(head.count, p), from, as_a, as_b);
        }
        if (!with_weight) return;
        float* const to = direct ? static_cast<float*>(out.weight) + v * head.width : slice_gradient.get() + from * head.width;
        for (int64_t h = 0; h < tall; ++h) {
          const int64_t columns = std::min(PANEL, head.width - h * PANEL);
          head_tiles.product({PARTS, most * BLOCK * PANEL, 0}, split, BLOCK * PANEL, rows, count,
                             words(along.get()) + (h * wide + group) * TILE_B, columns, sum, false);
          for (int64_t i = 0; i < rows; ++i) {
            float *const c = to + i * head.width + h * PANEL, *const s = sum + i * PANEL;
            if (add) {
              for (int64_t j = 0; j < columns; ++j) c[j] += s[j];
            } else {
              std::copy_n(s, columns, c);
            }
          }
        }
        if (!direct && end == wide) {
          k.round[static_cast<int>(out.weight_dtype)](to, rows * head.width, at(out.weight, out.weight_dtype, v * head.width));
        }
      });
      if (!with_hidden) continue;
      const int64_t strips = (end - group + STRIP - 1) / STRIP, bands = (head.width + HEIGHT - 1) / HEIGHT, all = panels(size);
      parallel_tasks(strips * bands, STRIP * HEIGHT * PANEL, threads, [&](int64_t task, float* sums) {
        const int64_t first = group + task / bands * STRIP, last = std::min(end, first + STRIP);
        const int64_t h = task % bands * HEIGHT, rows = std::min(HEIGHT, head.width - h);
        for (int64_t v = 0; v < all; v += DEPTH) {
          for (int64_t p = first; p < last; ++p) {
            head_tiles.product({PARTS, 0, most * SLICE_PANELS * TILE_B}, words(turned.get()) + (v * height + h) * PANEL, height * PANEL, rows,
                               std::min(DEPTH, all - v) * PANEL, held_at(0, p - group) + v * TILE_B, lanes_of(head.count, p),
                               sums + (p - first) * HEIGHT * PANEL, v > 0);
          }
        }
        for (int64_t p = first; p < last; ++p) {
          float* const c = grad_hidden.get() + (p * head.width + h) * PANEL;
          const float* const s = sums + (p - first) * HEIGHT * PANEL;
          const int64_t lanes = lanes_of(head.count, p);
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < lanes; ++j) c[i * PANEL + j] += s[i * PANEL + j];
          }
        }
      });
    }
  }
  if (!with_hidden) return;
  parallel_tasks(wide, head.width, threads, [&](int64_t p, float* row) {
    for (int64_t i = 0; i < lanes_of(head.count, p); ++i) {
      for (int64_t h = 0; h < head.width; ++h) row[h] = grad_hidden.get()[(p * head.width + h) * PANEL + i];
      k.round[static_cast<int>(out.hidden_dtype)](row, head.width, at(out.hidden, out.hidden_dtype, head.rows[p * PANEL + i] * head.width));
    }
  });
}

}  // namespace acpo
