// Feeds the segmenter arbitrary bytes as text, token borders, batch borders, entropies and scores, and checks what it promises:
// every token in one segment, the limits, and the same cuts from a reading, from several threads and from a sequence alone.
// tests/fuzz/run builds and runs it; without libFuzzer (-DREPLAY) it replays files.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "segmenter.h"

namespace {

using namespace acpo;

#define CHECK(condition) \
  if (!(condition)) std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition), std::abort()

const std::vector<std::pair<std::string, uint8_t>>& patterns() {
  using namespace pattern;
  static const std::vector<std::pair<std::string, uint8_t>> all = {
      {"Wait", marker | aloud}, {"So", marker}, {"Hmm", aloud}, {"let me", aloud}, {"Step 1", head}, {"第一步", head}, {"因此", marker},
      {"e.g.", abbreviation}, {"Dr.", abbreviation}, {"answer is", answer}, {"Answer:", answer}, {"答案", answer}, {"\\boxed{", boxed},
      {"<think>", think_open}, {"</think>", think_close}};
  return all;
}

// The first bytes of the input, one after the other; 0 where they are used up.
struct Input {
  const uint8_t* data;
  size_t size;
  uint8_t next() { return size == 0 ? 0 : (--size, *data++); }
};

bool same(const Cut& a, const Cut& b) { return a.ends == b.ends && a.terminal == b.terminal && a.rules == b.rules; }

void run(Input in) {
  const int64_t min_tokens = 1 + in.next() % 9, max_tokens = min_tokens + in.next() % 40, max_segments = 1 + in.next() % 12;
  const int64_t target = 1 + in.next() % 30, width = 1 + in.next() % 6, per_sequence = 1 + in.next() % 96;
  const uint8_t flags = in.next();
  const std::string_view text(reinterpret_cast<const char*>(in.data), in.size);

  // The vocabulary is the text itself, cut every `width` bytes; every 16th id is one that the tokenizer does not have.
  std::vector<int64_t> lengths;
  std::vector<int32_t> ids;
  for (size_t at = 0; at < text.size(); at += static_cast<size_t>(width)) {
    ids.push_back(static_cast<int32_t>(lengths.size()));
    lengths.push_back(static_cast<int64_t>(std::min(static_cast<size_t>(width), text.size() - at)));
  }
  const auto known = static_cast<int32_t>(lengths.size());
  if (flags & 1) {
    for (size_t t = 15; t < ids.size(); t += 16) ids.insert(ids.begin() + static_cast<int64_t>(t), known);
  }
  const auto count = static_cast<int64_t>(ids.size());
  std::vector<int64_t> offsets = {0};
  if (flags & 2) offsets.push_back(0);  // an empty sequence
  while (offsets.back() < count) offsets.push_back(std::min(count, offsets.back() + per_sequence));
  const auto sequences = static_cast<int64_t>(offsets.size()) - 1;

  std::array<float, kTextRules> weights = {0, 0.5F, 1, 1.5F, 2, 2.25F, 3, 8};
  if (flags & 4) weights = {0, 64, 0, 64, 1, 0, 1, 0.25F};
  const Segmenter segmenter(Automaton(text, lengths, known + 1, patterns(), weights), {min_tokens, max_tokens, max_segments}, target, 0.75F);

  std::vector<float> entropy(ids.size());
  for (size_t t = 0; t < ids.size(); ++t) entropy[t] = static_cast<float>(t < text.size() ? static_cast<int8_t>(text[t]) : 0) / 16;
  std::vector<int64_t> answer_start(static_cast<size_t>(sequences), -1);
  if (flags & 8) {
    for (int64_t b = 0; b < sequences; b += 2) answer_start[b] = (offsets[b + 1] - offsets[b]) / 2 - 1;
  }
  const double threshold = 1;
  Evidence evidence;
  if (flags & 16) evidence.entropy = entropy.data();
  if ((flags & 48) == 48) evidence.threshold = &threshold;
  if (flags & 8) evidence.answer_start = answer_start.data();

  const PackedIds batch{ids.data(), false, offsets.data(), sequences};
  const std::vector<Cut> cuts = segmenter.cut(batch, evidence, true, 1), threaded = segmenter.cut(batch, evidence, true, 3);
  const std::vector<Cut> unexplained = segmenter.cut(batch, evidence, false, 1);
  std::vector<float> scores(ids.size());
  std::vector<int64_t> found(static_cast<size_t>(sequences), -1);
  segmenter.read(batch, 2, scores.data(), found.data());
  for (int64_t b = 0; b < sequences; ++b) {
    if (answer_start[b] >= 0) found[b] = answer_start[b];
  }
  Evidence reading = evidence;
  reading.scores = scores.data(), reading.answer_start = found.data(), reading.detected = true;
  const std::vector<Cut> read = segmenter.cut(batch, reading, false, 1);

  const std::vector<int64_t> wide(ids.begin(), ids.end());
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t begin = offsets[b], length = offsets[b + 1] - begin;
    const Cut& cut = cuts[b];
    CHECK(same(cut, threaded[b]));
    CHECK(cut.ends == unexplained[b].ends && cut.ends == read[b].ends && cut.terminal == read[b].terminal);
    const int64_t alone_offsets[] = {0, length};
    Evidence alone = evidence;
    if (alone.entropy) alone.entropy += begin;
    if (alone.answer_start) alone.answer_start += b;
    CHECK(same(cut, segmenter.cut({wide.data() + begin, true, alone_offsets, 1}, alone, true, 1)[0]));

    CHECK(cut.ends.empty() == (length == 0));
    CHECK(static_cast<int64_t>(cut.ends.size()) <= max_segments);
    CHECK(cut.rules.size() == cut.ends.size());
    if (length == 0) continue;
    CHECK(cut.ends.back() == length);
    const auto inner = static_cast<int64_t>(cut.ends.size()) - cut.terminal;
    const int64_t reasoning = inner == 0 ? 0 : cut.ends[inner - 1];
    const int64_t most = std::max<int64_t>(1, std::min(max_segments - cut.terminal, reasoning / min_tokens));
    const int64_t longest = std::max(max_tokens, (reasoning + most - 1) / most);
    int64_t last = 0;
    for (int64_t k = 0; k < inner; ++k) {
      const int64_t n = cut.ends[k] - last;
      CHECK(n >= std::min(min_tokens, reasoning) && n <= longest);
      last = cut.ends[k];
    }
    CHECK(last < length || !cut.terminal);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  run({data, size});
  return 0;
}

#ifdef REPLAY
int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    std::ifstream file(names[i], std::ios::binary);
    const std::vector<char> data((std::istreambuf_iterator<char>(file)), {});
    run({reinterpret_cast<const uint8_t*>(data.data()), data.size()});
  }
  std::printf("%d inputs replayed\n", count - 1);
}
#endif
