// What is asked of torch tensors from here, by their Python attributes: the extension links against nothing of torch. An attribute takes
// some 30 ns, twice that in Python.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "groups.h"

namespace acpo {

enum class PlainCall { no, wants_gradient, yes, error };  // error: a Python exception is set

// Whether a call may go straight to a CPU kernel: see acpo_kernels/_library.py. watchers: functions without arguments, each of which says
// whether somebody watches; plain: the types of ordinary tensors, the first of which is torch.Tensor; strided: torch.strided.
PlainCall plain_call(PyObject* args, bool grad_enabled, PyObject* watchers, PyObject* plain, PyObject* strided);

// What follows throws pybind11::error_already_set.
uintptr_t address(PyObject* tensor);  // 0 for None
Values values(PyObject* tensor);      // of at most one dimension, read where it lies; not given for None
Hierarchy hierarchy(PyObject* token_offsets, PyObject* sequence_offsets, int64_t tokens);  // contiguous int64, as a Segments object has them

}  // namespace acpo
