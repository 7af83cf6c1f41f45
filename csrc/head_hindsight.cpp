// Both streams of hindsight_information from hidden states: each packed block of W serves both, the divergences are summed
// where the logits of both are in the L1.
//
// With a_j = exp((p_j - top_p) / T), b_j of the other stream and x_j = log(a_j / b_j), sums over j,
//   F = sum of b - a + a x >= 0,   B = sum of a - b - b x >= 0,   M = sum of b - a,   A = 1 + rest_p,   C = 1 + rest_q = A + M
//   KL(p || q) = F / A - (s - log1p(s)),   s =  M / A
//   KL(q || p) = B / C - (s - log1p(s)),   s = -M / C
// Every sum is of the order of what it measures: streams that nearly agree keep their relative accuracy, equal ones give 0.
// A new maximum shifts all x by one number d, and the sums follow in closed form (`rebase`).
#include <cstring>

#include "head_parts.h"

namespace acpo {
namespace {

// The sums against new maxima. Masses are 0 where a stream has met nothing but -inf.
void rebase(float top_p, float top_q, double inverse, int64_t i, Divergence* s) {
  const double a = s->mass_p[i], c = s->mass_q[i];
  const double shift_p = a > 0.0 ? (static_cast<double>(top_p) - s->top_p[i]) * inverse : 0.0;
  const double shift_q = c > 0.0 ? (static_cast<double>(top_q) - s->top_q[i]) * inverse : 0.0;
  s->top_p[i] = top_p;
  s->top_q[i] = top_q;
  if (shift_p == 0.0 && shift_q == 0.0) return;
  const double f = s->forward[i], b = s->backward[i], m = s->moved[i], d = shift_p - shift_q;
  const double ep = std::exp(-shift_p), eq = std::exp(-shift_q), gap = std::fabs(d) < 1.0 ? ep * std::expm1(d) : eq - ep;  // eq - ep
  const double ep_d = ep > 0.0 ? ep * d : 0.0, eq_d = eq > 0.0 ? eq * d : 0.0;
  s->forward[i] = eq * f + a * (gap - ep_d) - (f - m) * gap;
  s->backward[i] = ep * b + c * (eq_d - gap) + (m + b) * gap;
  s->moved[i] = eq * m + a * gap;
  s->mass_p[i] = a * ep;
  s->mass_q[i] = c * eq;
}

double mass(const Lanes& state, int64_t i) { return state.top[i] > -INFINITE ? 1.0 + state.rest[i] : 0.0; }

// KL from F / A, s and log1p(s); where the masses differ much, log1p(s) is the difference of the logarithms.
float divergence(double sum, double mass, double s, double difference) {
  const double kl = sum / mass - s + (std::fabs(s) < 0.5 ? std::log1p(s) : difference);
  return static_cast<float>(kl < 0.0 ? 0.0 : kl);
}

void hindsight_rows(const Head& head, const void* hindsight_hidden, int64_t hindsight_stride, const HindsightStatistics& out, int threads) {
  const HeadKernels& k = head_kernels();
  Head other = head;
  other.hidden = hindsight_hidden;
  other.hidden_stride = hindsight_stride;
  const Logits product[2] = {Logits(head, k, nullptr, threads), Logits(other, k, nullptr, threads)};
  const std::vector<LaneScales> scales = lane_scales(head, k.fused);
  const int64_t wide = panels(head.count), units = (head.vocab + UNIT - 1) / UNIT, block_floats = product[0].block_size();
  std::vector<Lanes> parts[2] = {std::vector<Lanes>(units * wide), std::vector<Lanes>(units * wide)};
  std::vector<float> target[2] = {std::vector<float>(head.count), std::vector<float>(head.count)};
  std::vector<Divergence> sums(units * wide);
  parallel_tasks(units, block_floats + 2 * BLOCK * PANEL, threads, [&](int64_t unit, float* scratch) {
    Lanes* state[2] = {parts[0].data() + unit * wide, parts[1].data() + unit * wide};
    Divergence* sum = sums.data() + unit * wide;
    for (int64_t p = 0; p < wide; ++p) {
      begin_lanes(state[0] + p);
      begin_lanes(state[1] + p);
      std::memset(sum + p, 0, sizeof(Divergence));
    }
    const int64_t last = std::min(head.vocab, (unit + 1) * UNIT);
    for (int64_t v = unit * UNIT; v < last; v += BLOCK) {
      const int64_t rows = std::min(BLOCK, last - v);
      product[0].pack(v, rows, scratch);
      for (int64_t p = 0; p < wide; ++p) {
        const int64_t lanes = lanes_of(head.count, p);
        float* const z[2] = {scratch + block_floats, scratch + block_floats + BLOCK * PANEL};
        for (int s = 0; s < 2; ++s) {
          product[s](scratch, Logits::STRIDE, v, rows, p, z[s], v + rows, 0, wide);
          k.statistics(z[s], rows, lanes, scales[p], state[s] + p);
          for (int64_t i = 0; i < lanes; ++i) {
            const int64_t id = head.ids[head.rows[p * PANEL + i]] - v;
            if (id >= 0 && id < rows) target[s][p * PANEL + i] = z[s][id * PANEL + i];
          }
        }
        for (int64_t i = 0; i < lanes; ++i) {
          rebase(state[0][p].top[i], state[1][p].top[i], scales[p].inverse[i], i, sum + p);
          sum[p].mass_p[i] = mass(state[0][p], i);
          sum[p].mass_q[i] = mass(state[1][p], i);
        }
        k.divergence(z[0], z[1], rows, lanes, scales[p], sum + p);
      }
    }
  });
  count_work({2 * head.count, 0, 0});

  finish_rows(head, parts[0], units, scales, target[0], {out.logp, out.entropy, out.kl, out.information});
  finish_rows(head, parts[1], units, scales, target[1], {out.hindsight_logp, out.log_ratio, out.log_ratio, out.log_ratio});
  for (int64_t n = 0; n < head.count; ++n) {
    const int64_t p = n / PANEL, i = n % PANEL, row = head.rows[n];
    // finish_rows left the centred logsumexp of a stream, or NaN where it holds one
    const double l_p = out.information[row], l_q = out.log_ratio[row];
    out.log_ratio[row] = out.hindsight_logp[row] - out.logp[row];
    if (l_p != l_p || l_q != l_q) {
      out.kl[row] = out.information[row] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    float top[2] = {-std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
    for (int64_t u = 0; u < units; ++u) {
      for (int s = 0; s < 2; ++s) top[s] = std::max(top[s], parts[s][u * wide + p].top[i]);
    }
    Divergence total{};
    for (int64_t u = 0; u < units; ++u) {
      Divergence& part = sums[u * wide + p];
      rebase(top[0], top[1], scales[p].inverse[i], i, &part);
      total.mass_p[i] += part.mass_p[i];
      total.mass_q[i] += part.mass_q[i];
      total.forward[i] += part.forward[i];
      total.backward[i] += part.backward[i];
      total.moved[i] += part.moved[i];
      total.only_p[i] += part.only_p[i];
      total.only_q[i] += part.only_q[i];
    }
    const double difference = std::log(total.mass_q[i]) - std::log(total.mass_p[i]);
    const float infinity = std::numeric_limits<float>::infinity();
    out.kl[row] = total.only_p[i] > 0.0f ? infinity
                                         : divergence(total.forward[i], total.mass_p[i], total.moved[i] / total.mass_p[i], difference);
    out.information[row] = total.only_q[i] > 0.0f
                               ? infinity
                               : divergence(total.backward[i], total.mass_q[i], -total.moved[i] / total.mass_q[i], -difference);
  }
}

}  // namespace

void head_hindsight(const Head& head, const void* hindsight_hidden, int64_t hindsight_stride, const HindsightStatistics& out, int threads) {
  for_some_rows(head, [&](const Head& part, int64_t) { hindsight_rows(part, hindsight_hidden, hindsight_stride, out, threads); });
}

}  // namespace acpo
