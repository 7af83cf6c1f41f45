// Bindings alone: every operation lives in a file of its own. Big arrays come as addresses of torch tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "segmenter.h"

PYBIND11_MAKE_OPAQUE(std::vector<acpo::Cut>)

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

acpo::PackedIds packed(uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences) {
  return {at<const void>(ids), wide, at<const int64_t>(offsets), sequences};
}

void bind_segmenter(py::module_& m) {
  m.attr("TEXT_RULES") = acpo::kTextRules;
  py::class_<std::vector<acpo::Cut>>(m, "Cuts")
      .def_property_readonly("num_segments",
                             [](const std::vector<acpo::Cut>& cuts) {
                               size_t total = 0;
                               for (const acpo::Cut& c : cuts) total += c.ends.size();
                               return total;
                             })
      .def("write",
           [](const std::vector<acpo::Cut>& cuts, uintptr_t offsets, uintptr_t token_offsets, uintptr_t sequence_offsets, uintptr_t terminal) {
             auto *tokens = at<int64_t>(token_offsets), *sequences = at<int64_t>(sequence_offsets);
             int64_t s = 0;
             tokens[0] = sequences[0] = 0;
             for (size_t b = 0; b < cuts.size(); ++b) {
               for (const int32_t e : cuts[b].ends) tokens[++s] = at<const int64_t>(offsets)[b] + e;
               sequences[b + 1] = s;
               at<bool>(terminal)[b] = cuts[b].terminal;
             }
           })
      .def("rules", [](const std::vector<acpo::Cut>& cuts) {
        std::vector<int> rules;
        for (const acpo::Cut& c : cuts) rules.insert(rules.end(), c.rules.begin(), c.rules.end());
        return rules;
      });
  py::class_<acpo::Segmenter>(m, "Segmenter")
      .def(py::init([](const py::bytes& text, uintptr_t lengths, size_t count, int64_t vocab_size,
                       std::vector<std::pair<std::string, uint8_t>> patterns, std::array<float, acpo::kTextRules> weights, float fork_score,
                       int64_t min_tokens, int64_t max_tokens, int64_t max_segments, int64_t target_tokens) {
        return acpo::Segmenter(acpo::Automaton(static_cast<std::string_view>(text), {at<const int64_t>(lengths), count}, vocab_size, std::move(patterns), weights),
                               {min_tokens, max_tokens, max_segments}, target_tokens, fork_score);
      }))
      .def("scores",
           [](const acpo::Segmenter& self, uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences, int threads, uintptr_t out) {
             self.scores(packed(ids, wide, offsets, sequences), threads, at<float>(out));
           },
           py::call_guard<py::gil_scoped_release>())
      .def("cut",
           [](const acpo::Segmenter& self, uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences, uintptr_t scores, uintptr_t entropy,
              std::optional<double> threshold, uintptr_t answer_start, bool explain, int threads) {
             const acpo::Evidence evidence{at<const float>(scores), at<const float>(entropy), threshold ? &*threshold : nullptr,
                                           at<const int64_t>(answer_start)};
             return self.cut(packed(ids, wide, offsets, sequences), evidence, explain, threads);
           },
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels and the segmenter of acpo_kernels.";
  bind_segmenter(m);
}
