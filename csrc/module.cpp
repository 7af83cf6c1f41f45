// Bindings alone: every operation lives in a file of its own. Big arrays come as addresses of torch tensors (0: none) and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "head.h"
#include "hindsight_information.h"
#include "isa.h"
#include "linear_policy_loss.h"
#include "logprob_entropy.h"
#include "policy_loss.h"
#include "recycle.h"
#include "segment_credit.h"
#include "segment_reduce.h"
#include "segmenter.h"
#include "tensors.h"

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

  m.def("cpu_isa", [] { return std::string(acpo::isa_name()); });
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

// A buffer of bytes for Python, which goes back where it came from when nobody refers to it.
struct Recycled {
  explicit Recycled(size_t size) : bytes(size), memory(acpo::recycle_take(size)) {}
  Recycled(const Recycled&) = delete;
  ~Recycled() { acpo::recycle_give(memory, bytes); }
  const size_t bytes;
  void* const memory;
};

void bind_memory(py::module_& m) {
  m.attr("RECYCLED") = acpo::RECYCLED;
  py::class_<Recycled>(m, "Recycled", py::buffer_protocol()).def(py::init<size_t>()).def_buffer([](Recycled& self) {
    return py::buffer_info(static_cast<uint8_t*>(self.memory), static_cast<py::ssize_t>(self.bytes));
  });
}

void bind_head(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<acpo::Head>(m, "Head").def(
      py::init([](uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, int64_t weight_stride, const std::string& type, int64_t vocab,
                  int64_t width, uintptr_t bias, double softcap, double temperature, uintptr_t temperatures, uintptr_t ids, uintptr_t rows,
                  int64_t count) {
        return acpo::Head{pointer<const void>(hidden), hidden_stride, pointer<const void>(weight), weight_stride, dtype(type), vocab, width,
                          pointer<const float>(bias), softcap, temperature, pointer<const double>(temperatures),
                          pointer<const int64_t>(ids), pointer<const int64_t>(rows), count};
      }));
  m.def(
      "head_forward",
      [](const acpo::Head& head, uintptr_t logp, uintptr_t entropy, uintptr_t maximum, uintptr_t logsumexp, int threads) {
        acpo::head_forward(head, nullptr, {pointer<float>(logp), pointer<float>(entropy), pointer<float>(maximum), pointer<float>(logsumexp)},
                           threads);
      },
      no_gil);
  m.def(
      "head_backward",
      [](const acpo::Head& head, uintptr_t entropy, uintptr_t maximum, uintptr_t logsumexp, uintptr_t grad_logp, uintptr_t grad_entropy,
         uintptr_t grad_hidden, uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
        acpo::head_backward(head, nullptr, {nullptr, pointer<float>(entropy), pointer<float>(maximum), pointer<float>(logsumexp)},
                            {pointer<const float>(grad_logp), pointer<const float>(grad_entropy), pointer<void>(grad_hidden), head.dtype,
                             pointer<void>(grad_weight), head.dtype, pointer<float>(grad_bias), false},
                            threads);
      },
      no_gil);
  m.def(
      "head_hindsight",
      [](const acpo::Head& head, uintptr_t hindsight_hidden, int64_t hindsight_stride, uintptr_t logp, uintptr_t hindsight_logp,
         uintptr_t entropy, uintptr_t log_ratio, uintptr_t kl, uintptr_t information, int threads) {
        acpo::head_hindsight(head, pointer<const void>(hindsight_hidden), hindsight_stride,
                             {pointer<float>(logp), pointer<float>(hindsight_logp), pointer<float>(entropy), pointer<float>(log_ratio),
                              pointer<float>(kl), pointer<float>(information)},
                             threads);
      },
      no_gil);
  m.def(
      "head_work",
      [] {
        const acpo::HeadWork work = acpo::head_work();
        return std::array{work.logits, work.hidden, work.weight};
      },
      "For tests: rows multiplied so far for logits, the gradient of hidden, the gradient of weight.");
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
      .def("read",
           [](const acpo::Segmenter& self, uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences, int threads, uintptr_t scores,
              uintptr_t answer_start) {
             self.read(packed(ids, wide, offsets, sequences), threads, pointer<float>(scores), pointer<int64_t>(answer_start));
           },
           py::call_guard<py::gil_scoped_release>())
      .def("cut",
           [](const acpo::Segmenter& self, uintptr_t ids, bool wide, uintptr_t offsets, int64_t sequences, uintptr_t scores, uintptr_t entropy,
              std::optional<double> threshold, uintptr_t answer_start, bool detected, bool explain, int threads) {
             const acpo::Evidence evidence{pointer<const float>(scores), pointer<const float>(entropy), threshold ? &*threshold : nullptr,
                                           pointer<const int64_t>(answer_start), detected};
             return self.cut(packed(ids, wide, offsets, sequences), evidence, explain, threads);
           },
           py::call_guard<py::gil_scoped_release>());
}

// Tensors of the packed layout come as they are.
using Tensor = py::handle;

const uint8_t* bytes(const Tensor& mask) { return pointer<const uint8_t>(acpo::address(mask.ptr())); }
acpo::Values values(const Tensor& x) { return acpo::values(x.ptr()); }
acpo::Hierarchy hierarchy(const Tensor& token_offsets, const Tensor& sequence_offsets, int64_t tokens) {
  return acpo::hierarchy(token_offsets.ptr(), sequence_offsets.ptr(), tokens);
}

// plain_call(args, grad_enabled, watchers, plain, strided) -> 0 (no), 1 (a gradient is wanted), 2 (yes); no pybind11, which takes longer
// than what it would call.
PyObject* plain_call(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(a[0]) || !PyTuple_Check(a[2]) || !PyTuple_Check(a[3]) || PyTuple_GET_SIZE(a[3]) == 0) {
    PyErr_SetString(PyExc_TypeError, "plain_call(args, grad_enabled, watchers, plain, strided)");
    return nullptr;
  }
  const acpo::PlainCall answer = acpo::plain_call(a[0], a[1] == Py_True, a[2], a[3], a[4]);
  return answer == acpo::PlainCall::error ? nullptr : PyLong_FromLong(static_cast<long>(answer));
}
PyMethodDef plain_call_method = {"plain_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_call)), METH_FASTCALL, nullptr};

void bind_segments(py::module_& m) {
  m.add_object("plain_call", PyCFunction_New(&plain_call_method, nullptr));
  m.def("segment_reduce", [](const Tensor& token_offsets, const Tensor& sequence_offsets, int64_t tokens, bool sequences, int reduce,
                             const Tensor& mask, int64_t channels, int64_t stride, const Tensor& x, const Tensor& out, int threads) {
    const acpo::SegmentReduce of{hierarchy(token_offsets, sequence_offsets, tokens), sequences, static_cast<acpo::Reduce>(reduce), bytes(mask),
                                 channels};
    const acpo::Values from = values(x);
    void* const to = pointer<void>(acpo::address(out.ptr()));
    const py::gil_scoped_release no_gil;
    acpo::segment_reduce(of, from.data, from.dtype, stride, to, threads);
  });
  m.def("segment_reduce_backward", [](const Tensor& token_offsets, const Tensor& sequence_offsets, int64_t tokens, bool sequences, int reduce,
                                      const Tensor& mask, int64_t channels, int64_t stride, const Tensor& grad, const Tensor& x,
                                      const Tensor& output, const Tensor& gradient, int threads) {
    const acpo::SegmentReduce of{hierarchy(token_offsets, sequence_offsets, tokens), sequences, static_cast<acpo::Reduce>(reduce), bytes(mask),
                                 channels};
    const acpo::Values to = values(gradient);
    const auto incoming = acpo::address(grad.ptr()), from = acpo::address(x.ptr()), reduced = acpo::address(output.ptr());
    const py::gil_scoped_release no_gil;
    acpo::segment_reduce_backward(of, pointer<const void>(incoming), pointer<const void>(from), to.dtype, stride, pointer<const void>(reduced),
                                  const_cast<void*>(to.data), threads);
  });
  m.def("segment_credit",
        [](const Tensor& token_offsets, const Tensor& sequence_offsets, int64_t tokens, const Tensor& scores, const Tensor& advantages,
           const Tensor& terminal, const Tensor& mask, bool additive, bool exclude_terminal, double bound, double gain, double reliability,
           const Tensor& reliabilities, double scale, const Tensor& scales, const Tensor& token_advantages, const Tensor& weights, int threads) {
          const acpo::SegmentCredit of{hierarchy(token_offsets, sequence_offsets, tokens), values(scores), values(advantages), bytes(terminal),
                                       bytes(mask), additive, exclude_terminal, bound, gain, reliability, values(reliabilities), scale,
                                       values(scales)};
          void *const credit = pointer<void>(acpo::address(token_advantages.ptr())), *const to = pointer<void>(acpo::address(weights.ptr()));
          const py::gil_scoped_release no_gil;
          acpo::segment_credit(of, credit, to, threads);
        });
}

acpo::PolicyLoss policy_loss(const Tensor& token_offsets, const Tensor& sequence_offsets, int64_t tokens, const Tensor& mask,
                             const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, const Tensor& entropy,
                             const Tensor& ref_logp, const Tensor& rollout_logp, double clip_low, double clip_high, int ratio,
                             std::optional<double> entropy_weight, const Tensor& entropy_weights, double kl_weight, double rollout_cap,
                             double denominator, const Tensor& denominators, int denominators_of) {
  return {hierarchy(token_offsets, sequence_offsets, tokens), bytes(mask), values(logp), values(old_logp), values(advantages), values(entropy),
          values(entropy_weights), values(ref_logp), values(rollout_logp), clip_low, clip_high, static_cast<acpo::Ratio>(ratio),
          entropy_weight.has_value(), entropy_weight.value_or(0.0), kl_weight, rollout_cap, denominator, values(denominators),
          static_cast<acpo::PolicyLoss::Of>(denominators_of)};
}

void bind_policy_loss(py::module_& m) {
  py::class_<acpo::PolicyLoss>(m, "PolicyLoss").def(py::init(&policy_loss));
  m.def("policy_loss", [](const acpo::PolicyLoss& of, uintptr_t loss, uintptr_t metrics, uintptr_t grad_logp, uintptr_t grad_entropy,
                          int threads) {
    const py::gil_scoped_release no_gil;
    acpo::policy_loss(of, pointer<void>(loss), pointer<void>(metrics), pointer<void>(grad_logp), pointer<void>(grad_entropy), threads);
  });
  m.def("linear_policy_loss", [](const acpo::Head& head, const acpo::PolicyLoss& of, uintptr_t loss, uintptr_t metrics, uintptr_t logp,
                                 uintptr_t entropy, uintptr_t hidden, uintptr_t weight, uintptr_t bias, int threads) {
    const py::gil_scoped_release no_gil;
    acpo::linear_policy_loss(head, of,
                             {pointer<float>(loss), pointer<float>(metrics), pointer<float>(logp), pointer<float>(entropy),
                              pointer<void>(hidden), pointer<void>(weight), pointer<float>(bias)},
                             threads);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels and the segmenter of acpo_kernels.";
  bind_logprob_entropy(m);
  bind_memory(m);
  bind_head(m);
  bind_hindsight_information(m);
  bind_segmenter(m);
  bind_segments(m);
  bind_policy_loss(m);
}
