// Bindings alone: every operation lives in a file of its own. Big arrays come as addresses of torch tensors (0: none) and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "hindsight_information.h"
#include "isa.h"
#include "logprob_entropy.h"
#include "segmenter.h"

PYBIND11_MAKE_OPAQUE(std::vector<acpo::Cut>)

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

acpo::Dtype dtype(const std::string& name) {
  if (name == "float32") return acpo::Dtype::float32;
  if (name == "bfloat16") return acpo::Dtype::bfloat16;
  if (name == "float16") return acpo::Dtype::float16;
  if (name == "float64") return acpo::Dtype::float64;
  throw std::invalid_argument("unsupported dtype " + name);
}

acpo::LogitRows logit_rows(uintptr_t logits, const std::string& type, int64_t count, int64_t vocab, int64_t inner, int64_t stride_outer,
                           int64_t stride_inner, uintptr_t ids, uintptr_t mask, double temperature, uintptr_t temperatures) {
  return {pointer<const void>(logits), dtype(type), count, vocab, inner, stride_outer, stride_inner, pointer<const int64_t>(ids),
          pointer<const uint8_t>(mask), temperature, pointer<const double>(temperatures)};
}

acpo::RowStatistics row_statistics(uintptr_t logp, uintptr_t entropy, uintptr_t maximum, uintptr_t logsumexp) {
  return {pointer<void>(logp), pointer<void>(entropy), pointer<void>(maximum), pointer<void>(logsumexp)};
}

void bind_logprob_entropy(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  m.def("cpu_isa", [] { return std::string(acpo::name(acpo::isa())); });
  m.def("restrict_cpu_isa", &acpo::restrict_isa, "For tests: the instruction set to use from here on, '' for the first choice.");

  py::class_<acpo::LogitRows>(m, "LogitRows").def(py::init(&logit_rows));
  py::class_<acpo::RowStatistics>(m, "RowStatistics").def(py::init(&row_statistics));
  m.def("logprob_entropy_forward", &acpo::logprob_entropy_forward, no_gil);
  m.def(
      "logprob_entropy_backward",
      [](const acpo::LogitRows& rows, const acpo::RowStatistics& saved, uintptr_t grad_logp, uintptr_t grad_entropy, uintptr_t gradient,
         int threads) {
        acpo::logprob_entropy_backward(rows, saved, pointer<const void>(grad_logp), pointer<const void>(grad_entropy),
                                       pointer<void>(gradient), threads);
      },
      no_gil);
}

void bind_hindsight_information(py::module_& m) {
  m.def(
      "hindsight_information",
      [](const acpo::LogitRows& policy, const acpo::LogitRows& hindsight, const std::array<uintptr_t, 6>& results, int threads) {
        const acpo::HindsightResults out{pointer<void>(results[0]), pointer<void>(results[1]), pointer<void>(results[2]),
                                         pointer<void>(results[3]), pointer<void>(results[4]), pointer<void>(results[5])};
        return acpo::hindsight_information(policy, hindsight, out, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

acpo::PackedIds packed(uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences) {
  return {pointer<const void>(ids), wide, pointer<const int64_t>(offsets), sequences};
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
             auto *tokens = pointer<int64_t>(token_offsets), *sequences = pointer<int64_t>(sequence_offsets);
             int64_t s = 0;
             tokens[0] = sequences[0] = 0;
             for (size_t b = 0; b < cuts.size(); ++b) {
               for (const int32_t e : cuts[b].ends) tokens[++s] = pointer<const int64_t>(offsets)[b] + e;
               sequences[b + 1] = s;
               pointer<bool>(terminal)[b] = cuts[b].terminal;
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
        acpo::Automaton automaton(static_cast<std::string_view>(text), {pointer<const int64_t>(lengths), count}, vocab_size, std::move(patterns),
                                  weights);
        return acpo::Segmenter(std::move(automaton), {min_tokens, max_tokens, max_segments}, target_tokens, fork_score);
      }))
      .def("scores",
           [](const acpo::Segmenter& self, uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences, int threads, uintptr_t out) {
             self.scores(packed(ids, wide, offsets, sequences), threads, pointer<float>(out));
           },
           py::call_guard<py::gil_scoped_release>())
      .def("cut",
           [](const acpo::Segmenter& self, uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences, uintptr_t scores, uintptr_t entropy,
              std::optional<double> threshold, uintptr_t answer_start, bool explain, int threads) {
             const acpo::Evidence evidence{pointer<const float>(scores), pointer<const float>(entropy), threshold ? &*threshold : nullptr,
                                           pointer<const int64_t>(answer_start)};
             return self.cut(packed(ids, wide, offsets, sequences), evidence, explain, threads);
           },
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels and the segmenter of acpo_kernels.";
  bind_logprob_entropy(m);
  bind_hindsight_information(m);
  bind_segmenter(m);
}
