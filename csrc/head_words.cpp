// head_backward from bf16: the walk of head.cpp with the operands of HeadWords (head_kernels.h). The gradient G of the logits is cut into
// bf16 numbers where it is in the L1: into the operand of dW, which stays in the L2, and that of dHidden, held for a slice.
//
// AMX takes three of them, which hold a float32 number. Pairs take one, at half the price of a product in float32: what rounding takes
// off the few large elements of a row, its target above all, is added apart, element by element, in float32. What it takes off the others is
// below 2^-17 of what the row's elements add up to each: with weights that point every way some 5e-5 of a row's largest dHidden and 1e-5 of dW,
// whose own rounding to bf16 is 4e-3. Where the elements are alike and the weights have a mean, what is taken off adds up: 1.4e-2 of dHidden for
// a uniform policy and weights whose mean is ten times their spread, 1.5 times the contract's budget.
#include <algorithm>

#include "head_parts.h"

namespace acpo {
namespace {

constexpr int64_t GROUP_ROWS = 1024;  // rows whose gradients of a slice are held: 8 MB a part
constexpr int64_t STRIP = 8;          // panels of rows in a piece of work for dHidden,
constexpr int64_t HEIGHT = 64;        // by this many h: 16 panels of k are 64 KB of W^T, in the L2 while the rows pass
constexpr int64_t DEPTH = 16;         // panels of k
constexpr int64_t SLICE_PANELS = SLICE / PANEL;

uint16_t* words(float* p) { return reinterpret_cast<uint16_t*>(p); }

const uint16_t* row_of(const void* matrix, int64_t stride, int64_t i) { return static_cast<const uint16_t*>(matrix) + i * stride; }

}  // namespace

void words_backward(const HeadWords& with, const Head& head, const float* logits, const HeadStatistics& saved, const HeadGradient& out, int threads) {
  const HeadKernels& k = head_kernels();
  const int64_t parts = with.parts, wide = panels(head.count), tall = panels(head.width), most = std::min(wide, GROUP_ROWS / PANEL);
  const int64_t height = (head.width + 15) / 16 * 16 + 1;  // one more, so that the panels of one h do not share L1 sets
  float* const sum_weight = sum_of(out);
  const bool with_weight = out.weight != nullptr || out.sum != nullptr, with_hidden = out.hidden != nullptr;
  const Buffer along(with_weight ? tall * wide * TILE_B / 2 : 0);
  const Logits product(head, k, with_weight ? along.get() : nullptr, threads);
  const std::vector<LaneScales> scales = lane_scales(head, k.fused);
  const std::vector<LaneGradient> gradients = lane_gradients(head, scales, saved, out);
  const Buffer turned(with_hidden ? SLICE_PANELS * height * PANEL / 2 : 0);                  // W^T of a slice: panels over v, [h][32]
  const Buffer held(with_hidden ? parts * most * SLICE_PANELS * TILE_B / 2 : 0);             // G of a slice: (part, n), panels over v
  const Buffer slice_gradient(with_weight && sum_weight == nullptr && wide > most ? SLICE * head.width : 0);
  const Buffer grad_hidden(with_hidden ? wide * head.width * PANEL : 0);                     // (n), [h][32]
  const Buffer apart(with_hidden && with.residues != nullptr ? head.count * head.width : 0);  // of dHidden, by residues
  std::vector<std::vector<Residue>> residues(SLICE / BLOCK * most);                          // of a slice: (block, n)
  if (with_hidden) std::fill_n(grad_hidden.get(), wide * head.width * PANEL, 0.0f);
  if (with_hidden && with.residues != nullptr) std::fill_n(apart.get(), head.count * head.width, 0.0f);
  const auto held_at = [&](int64_t part, int64_t p) { return words(held.get()) + (part * most + p) * SLICE_PANELS * TILE_B; };

  for (int64_t begin = 0; begin < head.vocab; begin += SLICE) {
    const int64_t size = std::min(SLICE, head.vocab - begin), blocks = (size + BLOCK - 1) / BLOCK;
    for (int64_t group = 0; group < wide; group += most) {
      const int64_t end = std::min(wide, group + most), count = std::min(head.count, end * PANEL) - group * PANEL;
      const bool add = out.add || group > 0;
      const int64_t parts_size = parts * most * BLOCK * PANEL / 2, found_size = with.residues != nullptr ? 3 * BLOCK * PANEL : 0;
      const int64_t part_size = with_weight ? BLOCK * head.width : 0;
      parallel_tasks(blocks, product.block_size() + 2 * BLOCK * PANEL + found_size + parts_size + part_size, threads, [&](int64_t block, float* scratch) {
        const int64_t from = block * BLOCK, v = begin + from, rows = std::min(BLOCK, size - from);
        const int64_t next = v + threads * BLOCK;  // what this thread takes on next, most likely
        const int64_t whole = block + 1 < blocks ? rows : panels(size) * PANEL - from;
        float *const own = scratch + product.block_size(), *const sum = own + BLOCK * PANEL, *const found = sum + BLOCK * PANEL;
        uint16_t* const split = words(found + found_size);
        float* const part_weight = found + found_size + parts_size;
        if (logits == nullptr) product.pack(v, rows, scratch);
        if (with_hidden && group == 0) {
          for (int64_t p = panels(from); p * PANEL < from + rows; ++p) {  // the panels of the slice that begin in this block
            with.transpose(static_cast<const uint16_t*>(weight_at(head, begin + p * PANEL)), head.weight_stride,
                           std::min(PANEL, size - p * PANEL), head.width, words(turned.get()) + p * height * PANEL);
          }
        }
        if (out.bias != nullptr && !add) std::fill_n(out.bias + v, rows, 0.0f);
        for (int64_t p = group; p < end; ++p) {
          const int64_t lanes = lanes_of(head.count, p);
          if (logits == nullptr) {
            product(scratch, Logits::STRIDE, v, rows, p, own, next, group, end);
          } else {
            take_logits(head, logits, v, rows, p, p + 1 < end ? v : next, p + 1 < end ? p + 1 : group, own);
          }
          gradient_of_block(head, k, saved, out, scales, gradients, v, rows, p, own);
          uint16_t *as_a[MOST_PARTS], *as_b[MOST_PARTS];
          for (int64_t part = 0; part < parts; ++part) {
            as_a[part] = with_weight ? split + (part * most + p - group) * BLOCK * PANEL : nullptr;
            as_b[part] = with_hidden ? held_at(part, p - group) : nullptr;
          }
          with.split(own, rows, whole, lanes, from, as_a, as_b);
          if (with.residues == nullptr) continue;
          Residue* const some = reinterpret_cast<Residue*>(found);
          residues[block * most + p - group].assign(some, some + with.residues(own, rows, lanes, gradients[p].keep, some));
        }
        if (!with_weight) return;
        for (int64_t h = 0; h < tall; ++h) {
          const int64_t columns = std::min(PANEL, head.width - h * PANEL);
          if (logits != nullptr) fetch_weight(head, next, h, tall);
          with.product({parts, most * BLOCK * PANEL, 0}, split, BLOCK * PANEL, rows, count, words(along.get()) + (h * wide + group) * TILE_B, columns,
                       sum, false);
          for (int64_t p = group; p < end; ++p) {
            for (const Residue& r : residues[block * most + p - group]) {
              const uint16_t* const x = row_of(head.hidden, head.hidden_stride, head.rows[p * PANEL + r.lane]);
              with.add(r.value, x + h * PANEL, columns, sum + r.v * PANEL);
            }
          }
          for (int64_t i = 0; i < rows; ++i) std::copy_n(sum + i * PANEL, columns, part_weight + i * head.width + h * PANEL);
        }
        float* const before = sum_weight != nullptr ? sum_weight + v * head.width : slice_gradient.get() + from * head.width;
        leave_weight(head, k, out, v, rows, part_weight, before, add, end == wide);
      });
      if (!with_hidden) continue;
      const int64_t strips = (end - group + STRIP - 1) / STRIP, bands = (head.width + HEIGHT - 1) / HEIGHT, all = panels(size);
      parallel_tasks(strips * bands, STRIP * HEIGHT * PANEL, threads, [&](int64_t task, float* sums) {
        const int64_t first = group + task / bands * STRIP, last = std::min(end, first + STRIP);
        const int64_t h = task % bands * HEIGHT, rows = std::min(HEIGHT, head.width - h);
        for (int64_t v = 0; v < all; v += DEPTH) {
          for (int64_t p = first; p < last; ++p) {
            with.product({parts, 0, most * SLICE_PANELS * TILE_B}, words(turned.get()) + (v * height + h) * PANEL, height * PANEL, rows,
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
          if (with.residues == nullptr) continue;
          for (int64_t block = 0; block < blocks; ++block) {
            for (const Residue& r : residues[block * most + p - group]) {
              with.add(r.value, row_of(head.weight, head.weight_stride, begin + block * BLOCK + r.v) + h, rows,
                       apart.get() + (p * PANEL + r.lane) * head.width + h);
            }
          }
        }
      });
    }
  }
  if (!with_hidden) return;
  parallel_tasks(wide, head.width, threads, [&](int64_t p, float* row) {
    for (int64_t i = 0; i < lanes_of(head.count, p); ++i) {
      const float* const more = with.residues == nullptr ? nullptr : apart.get() + (p * PANEL + i) * head.width;
      for (int64_t h = 0; h < head.width; ++h) row[h] = grad_hidden.get()[(p * head.width + h) * PANEL + i] + (more == nullptr ? 0.0f : more[h]);
      k.round[static_cast<int>(out.hidden_dtype)](row, head.width, at(out.hidden, out.hidden_dtype, head.rows[p * PANEL + i] * head.width));
    }
  });
}

}  // namespace acpo
