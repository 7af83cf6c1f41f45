// Bindings alone: every operation lives in a file of its own.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "isa.h"
#include "logprob_entropy.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels and the segmenter of acpo_kernels. Tensors come as addresses (0: none) and sizes.";
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
