// Every CPU kernel through the thread pool, from several callers at once, under the thread sanitizer: no Python and no torch, which is not
// instrumented. Each caller's results must be, to the bit, those of one thread alone. tests/sanitize/run builds and runs it.
//
//   threads [seconds: rounds are repeated for so long, default: one round each]
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "head.h"
#include "hindsight_information.h"
#include "isa.h"
#include "linear_policy_loss.h"
#include "logprob_entropy.h"
#include "policy_loss.h"
#include "segment_credit.h"
#include "segment_reduce.h"
#include "segmenter.h"

namespace {

using namespace acpo;

using Bytes = std::vector<char>;
struct Case {
  std::string name;
  std::function<Bytes(int threads)> run;
};

std::mt19937 draw(1);
std::vector<float> normal(int64_t n, float scale = 1) {
  std::normal_distribution<float> of(0, scale);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = of(draw);
  return out;
}
std::vector<uint16_t> rounded(const std::vector<float>& from) {  // to bf16, towards zero
  std::vector<uint16_t> out(from.size());
  for (size_t i = 0; i < from.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &from[i], 4);
    out[i] = static_cast<uint16_t>(bits >> 16);
  }
  return out;
}
std::vector<int64_t> below(int64_t n, int64_t end) {
  std::vector<int64_t> out(static_cast<size_t>(n));
  for (int64_t& x : out) x = static_cast<int64_t>(draw() % static_cast<uint64_t>(end));
  return out;
}

// Results of several arrays behind one another.
class Results {
 public:
  float* floats(int64_t n, float value = 0) {
    parts_.emplace_back(static_cast<size_t>(n), value);
    return parts_.back().data();
  }
  Bytes bytes() const {
    Bytes out;
    for (const auto& part : parts_) {
      const auto* from = reinterpret_cast<const char*>(part.data());
      out.insert(out.end(), from, from + part.size() * sizeof(float));
    }
    return out;
  }

 private:
  std::vector<std::vector<float>> parts_;
};

constexpr int64_t ROWS = 24, VOCAB = 9000;           // of logits: seven ranges of rows
constexpr int64_t HEAD_ROWS = 70, HEAD_VOCAB = 9000, WIDTH = 40;  // of the head: three slices of the vocabulary
constexpr int64_t TOKENS_ = 160'000;                 // of the packed operations: five shares, and long groups in pieces

struct Logits {
  std::vector<float> x = normal(ROWS * VOCAB, 3), y = normal(ROWS * VOCAB, 3), grad = normal(ROWS);
  std::vector<uint16_t> x16 = rounded(x), y16 = rounded(y);
  std::vector<int64_t> ids = below(ROWS, VOCAB);
  std::vector<uint8_t> mask = std::vector<uint8_t>(ROWS, 1);
  Logits() { mask[3] = 0; }
  LogitRows rows(const void* at, Dtype dtype) const { return {at, dtype, ROWS, VOCAB, ROWS, 0, VOCAB, ids.data(), mask.data(), 0.9, nullptr}; }
};

struct Packed {
  std::vector<int64_t> token_offsets = {0}, sequence_offsets = {0};
  std::vector<float> values, scores, advantages, logp, old_logp, ref_logp, entropy;
  std::vector<uint8_t> mask, terminal;
  Packed() {
    while (token_offsets.back() < TOKENS_) {
      const int64_t n = token_offsets.size() == 40 ? 50'000 : token_offsets.size() % 9 == 0 ? 0 : 1 + static_cast<int64_t>(draw() % 300);
      token_offsets.push_back(std::min(TOKENS_, token_offsets.back() + n));
    }
    const auto segments = static_cast<int64_t>(token_offsets.size()) - 1;
    while (sequence_offsets.back() < segments) sequence_offsets.push_back(std::min(segments, sequence_offsets.back() + static_cast<int64_t>(draw() % 12)));
    values = normal(2 * TOKENS_), scores = normal(segments), advantages = normal(sequences());
    logp = normal(TOKENS_, 0.1F), old_logp = normal(TOKENS_, 0.1F), ref_logp = normal(TOKENS_, 0.1F), entropy = normal(TOKENS_);
    for (int64_t t = 0; t < TOKENS_; ++t) mask.push_back(t % 7 != 0);
    for (int64_t b = 0; b < sequences(); ++b) terminal.push_back(b % 2 == 0);
  }
  int64_t segments() const { return static_cast<int64_t>(token_offsets.size()) - 1; }
  int64_t sequences() const { return static_cast<int64_t>(sequence_offsets.size()) - 1; }
  Hierarchy hierarchy() const { return {token_offsets.data(), sequence_offsets.data(), TOKENS_, segments(), sequences()}; }
};

Values all_of(const std::vector<float>& x) { return {x.data(), Dtype::float32, 1}; }
constexpr Values NONE = {nullptr, Dtype::float32, 0};

PolicyLoss policy_loss_of(const Packed& p, Ratio ratio) {
  return {p.hierarchy(), p.mask.data(), all_of(p.logp), all_of(p.old_logp), all_of(p.values), all_of(p.entropy), NONE, all_of(p.ref_logp), NONE,
          0.2, 0.28, ratio, true, 1e-3, 0.01, 2.0, 0.0, NONE, PolicyLoss::Of::all};
}

void add_logits(std::vector<Case>& cases) {
  static const Logits l;
  for (const bool half : {false, true}) {
    const std::string type = half ? " bf16" : " fp32";
    const LogitRows rows = l.rows(half ? static_cast<const void*>(l.x16.data()) : l.x.data(), half ? Dtype::bfloat16 : Dtype::float32);
    const LogitRows other = l.rows(half ? static_cast<const void*>(l.y16.data()) : l.y.data(), rows.dtype);
    cases.push_back({"logprob_entropy" + type, [rows](int threads) {
                       Results r;
                       const RowStatistics out = {r.floats(ROWS), r.floats(ROWS), r.floats(ROWS), r.floats(ROWS)};
                       logprob_entropy_forward(rows, out, threads);
                       logprob_entropy_backward(rows, out, l.grad.data(), l.grad.data(), r.floats(ROWS * VOCAB), threads);
                       return r.bytes();
                     }});
    cases.push_back({"hindsight_information" + type, [rows, other](int threads) {
                       Results r;
                       hindsight_information(rows, other, {r.floats(ROWS), r.floats(ROWS), r.floats(ROWS), r.floats(ROWS), r.floats(ROWS), r.floats(ROWS)},
                                             threads);
                       return r.bytes();
                     }});
  }
}

void add_packed(std::vector<Case>& cases) {
  static const Packed p;
  for (const Reduce reduce : {Reduce::sum, Reduce::mean, Reduce::max}) {
    for (const bool sequences : {false, true}) {
      cases.push_back({"segment_reduce", [=](int threads) {
                         Results r;
                         const SegmentReduce of = {p.hierarchy(), sequences, reduce, p.mask.data(), 2};
                         const int64_t groups = sequences ? p.sequences() : p.segments();
                         float* const out = r.floats(2 * groups);
                         segment_reduce(of, p.values.data(), Dtype::float32, TOKENS_, out, threads);
                         segment_reduce_backward(of, out, p.values.data(), Dtype::float32, TOKENS_, out, r.floats(2 * TOKENS_), threads);
                         return r.bytes();
                       }});
    }
  }
  for (const bool additive : {false, true}) {
    cases.push_back({"segment_credit", [=](int threads) {
                       Results r;
                       const SegmentCredit of = {p.hierarchy(), all_of(p.scores), all_of(p.advantages), p.terminal.data(), p.mask.data(), additive, true,
                                                 0.5, 0.5, 0.8, NONE, 0.0, NONE};
                       float* const tokens = r.floats(TOKENS_);
                       segment_credit(of, tokens, r.floats(p.segments()), threads);
                       return r.bytes();
                     }});
  }
  for (const Ratio ratio : {Ratio::token, Ratio::segment, Ratio::sequence}) {
    cases.push_back({"policy_loss", [=](int threads) {
                       Results r;
                       float *const loss = r.floats(1), *const metrics = r.floats(POLICY_METRICS), *const logp = r.floats(TOKENS_);
                       policy_loss(policy_loss_of(p, ratio), loss, metrics, logp, r.floats(TOKENS_), threads);
                       return r.bytes();
                     }});
  }
}

struct HeadInputs {
  std::vector<float> hidden = normal(HEAD_ROWS * WIDTH), other = normal(HEAD_ROWS * WIDTH), weight = normal(HEAD_VOCAB * WIDTH, 0.3F),
                     bias = normal(HEAD_VOCAB), grad = normal(HEAD_ROWS), advantages = normal(HEAD_ROWS), old_logp = normal(HEAD_ROWS);
  std::vector<uint16_t> hidden16 = rounded(hidden), other16 = rounded(other), weight16 = rounded(weight);
  std::vector<int64_t> ids = below(HEAD_ROWS, HEAD_VOCAB), rows, token_offsets = {0, 20, 31, HEAD_ROWS}, sequence_offsets = {0, 2, 3};
  std::vector<uint8_t> active = std::vector<uint8_t>(HEAD_ROWS, 1);
  HeadInputs() {
    for (int64_t t = 0; t < HEAD_ROWS; ++t) {
      if (t % 10 != 4) rows.push_back(t);
      active[t] = t % 10 != 4;
    }
  }
  Head head(bool half) const {
    return {half ? static_cast<const void*>(hidden16.data()) : hidden.data(), WIDTH, half ? static_cast<const void*>(weight16.data()) : weight.data(), WIDTH,
            half ? Dtype::bfloat16 : Dtype::float32, HEAD_VOCAB, WIDTH, bias.data(), 30.0, 0.9, nullptr, ids.data(), rows.data(),
            static_cast<int64_t>(rows.size())};
  }
};

void add_head(std::vector<Case>& cases) {
  static const HeadInputs h;
  for (const bool half : {false, true}) {
    const std::string type = half ? " bf16" : " fp32";
    cases.push_back({"head" + type, [half](int threads) {
                       Results r;
                       const Head head = h.head(half);
                       const HeadStatistics out = {r.floats(HEAD_ROWS), r.floats(HEAD_ROWS), r.floats(HEAD_ROWS), r.floats(HEAD_ROWS)};
                       head_forward(head, nullptr, out, threads);
                       float *const dhidden = r.floats(HEAD_ROWS * WIDTH), *const dweight = r.floats(HEAD_VOCAB * WIDTH);
                       head_backward(head, nullptr, out,
                                     {h.grad.data(), h.grad.data(), dhidden, head.dtype, dweight, head.dtype, r.floats(HEAD_VOCAB), false}, threads);
                       return r.bytes();
                     }});
    cases.push_back({"head_hindsight" + type, [half](int threads) {
                       Results r;
                       const auto row = [&r] { return r.floats(HEAD_ROWS); };
                       float *const a = row(), *const b = row(), *const c = row(), *const d = row(), *const e = row(), *const f = row();
                       head_hindsight(h.head(half), half ? static_cast<const void*>(h.other16.data()) : h.other.data(), WIDTH, {a, b, c, d, e, f}, threads);
                       return r.bytes();
                     }});
    for (const Ratio ratio : {Ratio::token, Ratio::sequence}) {
      cases.push_back({"linear_policy_loss" + type, [half, ratio](int threads) {
                         Results r;
                         const PolicyLoss loss = {{h.token_offsets.data(), h.sequence_offsets.data(), HEAD_ROWS, 3, 2}, h.active.data(), NONE,
                                                  all_of(h.old_logp), all_of(h.advantages), NONE, NONE, NONE, NONE, 0.2, 0.28, ratio, true, 1e-3, 0.0, 2.0,
                                                  0.0, NONE, PolicyLoss::Of::all};
                         float *const value = r.floats(1), *const metrics = r.floats(POLICY_METRICS), *const logp = r.floats(HEAD_ROWS),
                               *const entropy = r.floats(HEAD_ROWS), *const dhidden = r.floats(HEAD_ROWS * WIDTH),
                               *const dweight = r.floats(HEAD_VOCAB * WIDTH);
                         linear_policy_loss(h.head(half), loss, {value, metrics, logp, entropy, dhidden, dweight, r.floats(HEAD_VOCAB)}, threads);
                         return r.bytes();
                       }});
    }
  }
}

void add_segmenter(std::vector<Case>& cases) {
  static const std::vector<std::string> words = {"Wait", ",", " so", " 2", "+", "2", ".\n\n", " Hmm", "\n", " The", " answer is", " 4", ".", "$x$", "Step 1"};
  static const Segmenter segmenter = [] {
    std::string text;
    std::vector<int64_t> lengths;
    for (const std::string& word : words) text += word, lengths.push_back(static_cast<int64_t>(word.size()));
    using namespace pattern;
    return Segmenter(Automaton(text, lengths, static_cast<int64_t>(words.size()), {{"Wait", marker | aloud}, {"Hmm", aloud}, {"answer is", answer}},
                               {0, 0.5F, 1, 1.5F, 2, 2.25F, 3, 8}),
                     {4, 64, 32}, 16, 0.75F);
  }();
  static const std::vector<int64_t> ids = below(30'000, static_cast<int64_t>(words.size()));
  static const std::vector<float> entropy = normal(30'000);
  static const std::vector<int64_t> offsets = [] {
    std::vector<int64_t> out = {0};
    while (out.back() < 30'000) out.push_back(std::min<int64_t>(30'000, out.back() + 1 + static_cast<int64_t>(draw() % 900)));
    return out;
  }();
  cases.push_back({"segmenter", [](int threads) {
                     const PackedIds batch = {ids.data(), true, offsets.data(), static_cast<int64_t>(offsets.size()) - 1};
                     Results r;
                     std::vector<int64_t> answers(offsets.size() - 1);
                     segmenter.read(batch, threads, r.floats(30'000), answers.data());
                     Evidence evidence;
                     evidence.entropy = entropy.data();
                     Bytes out = r.bytes();
                     for (const Cut& cut : segmenter.cut(batch, evidence, true, threads)) {
                       for (const int32_t end : cut.ends) out.push_back(static_cast<char>(end));
                       out.push_back(cut.terminal);
                     }
                     return out;
                   }});
}

}  // namespace

int main(int count, char** arguments) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(count > 1 ? std::atoi(arguments[1]) : 0);
  std::vector<Case> cases;
  add_logits(cases), add_packed(cases), add_head(cases), add_segmenter(cases);
  std::atomic<int64_t> calls{0}, wrong{0};
  for (const char* isa : {"baseline", "avx2", "avx512", "avx512bf16", "amx"}) {
    try {
      restrict_isa(isa);
    } catch (const std::invalid_argument&) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    std::vector<Bytes> alone;
    for (const Case& c : cases) alone.push_back(c.run(1));
    for (const int threads : {2, 3, 5, 8}) {
      do {
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 4; ++caller) {
          callers.emplace_back([&, caller] {
            for (size_t i = 0; i < cases.size(); ++i) {
              const size_t k = (i + static_cast<size_t>(caller) * 5) % cases.size();
              ++calls;
              if (cases[k].run(threads) != alone[k]) {
                ++wrong;
                std::printf("%s: %s of %d threads differs from that of one\n", isa, cases[k].name.c_str(), threads);
              }
            }
          });
        }
        for (std::thread& caller : callers) caller.join();
      } while (std::chrono::steady_clock::now() < until);
    }
    std::printf("%s: %zu kernels\n", isa, cases.size());
  }
  std::printf("%ld calls, 4 callers, pools of 2 to 8 threads: %ld differ\n", static_cast<long>(calls), static_cast<long>(wrong));
  return wrong > 0;
}
