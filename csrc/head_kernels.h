// The kernels of the head, compiled once for each instruction set. They work on PANELS: a matrix [rows, columns] is cut into
// panels of 32 columns, each stored [rows][32]. A product C = A B reads B as panels, broadcasts the elements of A (which is a
// panel matrix too, read along its rows or down its columns), and writes C in a panel or in rows:
//
//   product   C             k    A                           B
//   logits    Z [v, n]      h    W   panels over h, [v][32]  X^T panels over n, [h][32]
//   hidden    dX [n, h]     v    G   panels over n, [v][32]  W   panels over h, [v][32]     A down its columns
//   weight    dW [v, h]     n    G   panels over n, [v][32]  X   panels over h, [n][32]
//
// so that a block of W is packed once for both products it takes part in, the hidden states once a call, the logits Z and
// their gradient G never. A vector of logits holds one vocabulary entry of many rows: statistics are a number a lane, nothing
// is reduced across lanes. An element of C is a sum over k in its order, in pieces of CHUNK or CHUNK_HIDDEN that each begin at 0: it depends
// on nothing beside it.
#pragma once

#include <stdint.h>

namespace acpo {

constexpr int64_t PANEL = 32;   // two AVX-512 vectors, and the k of one AMX tile
constexpr int64_t CHUNK = 128;  // 128 x 32 floats of B are 16 KB: they stay in a 32 KB L1 beside 7 KB of A
constexpr int64_t CHUNK_HIDDEN = 96;  // the same beside all of A, which is read down its columns: 12 KB each

// What the softmax of PANEL rows has met so far: the maximum, and the sums beside it as logprob_entropy_row.h defines them
// (`rest` over all but one element that holds the maximum, `weighted` of e (top - z) / T).
struct Lanes {
  alignas(64) float top[PANEL];
  alignas(64) double rest[PANEL], weighted[PANEL];
};

// The constants of 2^64 exp(u / T), each row with its own temperature.
struct LaneScales {
  alignas(64) float log2e[PANEL];               // log2(e) / T
  alignas(64) float first[PANEL], second[PANEL];  // with fused products: the rounding of log2e; without: T ln(2) in two parts
  alignas(64) float cut[PANEL];                 // the smallest u that counts
  alignas(64) double inverse[PANEL];            // 1 / T
};

// Static, as is what follows: each instruction set compiles a copy of its own.
static inline void set_scale(double temperature, bool fused, int64_t lane, LaneScales* out) {
  const double k = 1.4426950408889634 / temperature;
  const float rounded = static_cast<float>(k);
  out->log2e[lane] = rounded;
  if (fused) {
    out->first[lane] = 0.0f;
    out->second[lane] = static_cast<float>(k - rounded);
  } else {  // the first part has 16 bits, so that its product with an exponent is exact
    union {
      float f;
      uint32_t u;
    } part;
    part.f = static_cast<float>(1.0 / k);
    part.u &= 0xffffff00u;
    out->first[lane] = part.f;
    out->second[lane] = static_cast<float>(1.0 / k - part.f);
  }
  const double cut = -188.0 / k;  // 2^-188 2^64 is the smallest exponent that stays normal
  out->cut[lane] = cut < -3.0e38 ? -3.0e38f : static_cast<float>(cut);
  out->inverse[lane] = 1.0 / temperature;
}

// dlogits_j = 2^64 exp(u_j / T) (a + b u_j log2(e) / T), u_j = z_j - top; the target apart.
struct LaneGradient {
  alignas(64) float top[PANEL], a[PANEL], b[PANEL];
  alignas(64) float keep[PANEL];  // what bf16 takes off a larger element is kept apart
};

// What the divergences of PANEL rows need, against the maxima of both streams: a_j = exp((p_j - top_p) / T), b_j likewise,
// x_j = log(a_j / b_j); see head_hindsight.cpp.
struct Divergence {
  alignas(64) float top_p[PANEL], top_q[PANEL];
  alignas(64) double mass_p[PANEL], mass_q[PANEL];                  // sum of a, of b
  alignas(64) double forward[PANEL], backward[PANEL], moved[PANEL];  // sums of b - a + a x >= 0, of a - b - b x >= 0, of b - a
  alignas(64) float only_p[PANEL], only_q[PANEL];                   // not 0: an entry that is possible in this stream alone
};

// What the caller reads next: a product of logits asks for it, little by little, while it computes. Null for nothing.
struct Ahead {
  const char* at;
  int64_t lines;  // of 64 bytes
};

// `count` lines of it, into the L2.
static inline void fetch(Ahead* next, int64_t count) {
  for (; count > 0 && next->lines > 0; --count, --next->lines, next->at += 64) __builtin_prefetch(next->at, 0, 2);
}

struct HeadKernels {
  bool fused;  // has fused multiply-add: which form LaneScales takes
  // rows x width elements of float32, bf16 or fp16 (by Dtype), `stride` apart, into float32 panels, `panel` floats apart
  void (*pack[3])(const void* from, int64_t stride, int64_t rows, int64_t width, float* to, int64_t panel);
  // z[v][32] for the first `lanes` rows of a panel of X^T
  void (*logits)(const float* weight, int64_t panel, int64_t rows, int64_t width, const float* hidden, int64_t lanes, float* z, Ahead next);
  // c[n][32] += sum_v g[v][n] weight[v][32], v < rows, n < lanes
  void (*hidden)(const float* g, const float* weight, int64_t rows, int64_t lanes, float* c);
  // c[v][0:columns] = sum_n g[v][n] hidden[n][32], n < count
  void (*weight)(const float* g, int64_t panel, int64_t rows, const float* hidden, int64_t count, float* c, int64_t stride, int64_t columns);
  void (*finish)(float* z, int64_t rows, int64_t lanes, const float* bias, float softcap);  // bias null, softcap 0: none
  void (*statistics)(const float* z, int64_t rows, int64_t lanes, const LaneScales& scales, Lanes* state);
  void (*gradient)(float* z, int64_t rows, int64_t lanes, const LaneScales& scales, const LaneGradient& g, float softcap);
  // adds the sums of Divergence against out's maxima, which are those of what was met so far, these rows included
  void (*divergence)(const float* p, const float* q, int64_t rows, int64_t lanes, const LaneScales& scales, Divergence* out);
  void (*bias)(const float* g, int64_t rows, int64_t lanes, float* sums);  // sums[v] += sum_n g[v][n]
  void (*round[3])(const float* from, int64_t count, void* to);
  void (*leave[3])(const float* from, int64_t count, void* to);  // the same past the caches, for what is not read again
};
extern const HeadKernels head_baseline, head_avx2, head_avx512;

// The products from bf16, whose words hold two numbers: C[i][32] = or += sum_k A[i][k] B[k][j], A in panels of 32 k, [i][32] bf16, each of
// them whole multiples of 16 rows; B in panels of 32 k, [16 pairs of k][32 columns][2] bf16. See head_words.cpp.
constexpr int64_t TILE_B = PANEL * PANEL;  // elements in a panel of B
struct Summands {  // of A or of B: the product is the sum over them, `a` and `b` elements apart
  int64_t count, a, b;
};
struct Residue {  // of one element of the gradient of the logits: what bf16 does not hold
  int32_t v, lane;
  float value;
};
constexpr int64_t MOST_PARTS = 3;
struct HeadWords {
  int64_t parts;  // bf16 numbers that stand for an element of the gradient: MOST_PARTS hold it exactly, 1 leaves residues
  // rows x width elements, `stride` apart, into panels of A; zeros up to whole panels and 16 rows
  void (*pack)(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, uint16_t* to, int64_t panel);
  // `rows` <= 32 rows of W, turned over: to[h][v] of a panel of 32 v
  void (*transpose)(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, uint16_t* to);
  void (*logits)(const uint16_t* a, int64_t panel, int64_t rows, int64_t depth, const uint16_t* b, int64_t columns, float* c, Ahead next);
  void (*product)(const Summands& of, const uint16_t* a, int64_t panel, int64_t rows, int64_t depth, const uint16_t* b, int64_t columns, float* c,
                  bool add);
  // g[v][32] in `parts`: as_a[part] [v][32], and as_b[part], pairs of v, from pair `from / 2` of its panels on; zeros past `lanes` and up
  // to `whole` rows
  void (*split)(const float* g, int64_t rows, int64_t whole, int64_t lanes, int64_t from, uint16_t* const* as_a, uint16_t* const* as_b);
  // those of elements larger than keep[lane], in the order of v; null where nothing is left. Returns their number, rows x 32 at most
  int64_t (*residues)(const float* g, int64_t rows, int64_t lanes, const float* keep, Residue* to);
  void (*add)(float factor, const uint16_t* x, int64_t count, float* to);  // to[i] += factor x[i]
};
extern const HeadWords head_tiles, head_pairs;  // on AMX; beside head_avx512, with VDPBF16PS

}  // namespace acpo
