// Bindings alone: every operation lives in a file of its own.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) { m.doc() = "The CPU kernels and the segmenter of acpo_kernels."; }
