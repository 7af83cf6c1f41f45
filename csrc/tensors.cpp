#include "tensors.h"

#include <pybind11/pybind11.h>

namespace acpo {
namespace {

namespace py = pybind11;

struct Names {
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* is_zeros = PyUnicode_InternFromString("_is_zerotensor");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
};
const Names& names() {
  static const Names all;
  return all;
}

// 1, 0, or -1 with an exception; takes over the reference
int truth(PyObject* value) {
  if (value == nullptr) return -1;
  const int result = PyObject_IsTrue(value);
  Py_DECREF(value);
  return result;
}

}  // namespace

PlainCall plain_call(PyObject* args, bool grad_enabled, PyObject* watchers, PyObject* plain, PyObject* strided) {
  bool yes = true;
  for (Py_ssize_t i = 0; yes && i < PyTuple_GET_SIZE(watchers); ++i) {
    const int watches = truth(PyObject_CallNoArgs(PyTuple_GET_ITEM(watchers, i)));
    if (watches < 0) return PlainCall::error;
    yes = watches == 0;
  }
  PyTypeObject* const tensor = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(plain, 0));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    PyObject* const x = PyTuple_GET_ITEM(args, i);
    if (!PyObject_TypeCheck(x, tensor)) continue;
    if (grad_enabled) {
      const int wants = truth(PyObject_GetAttr(x, names().requires_grad));
      if (wants != 0) return wants < 0 ? PlainCall::error : PlainCall::wants_gradient;
    }
    if (!yes) continue;
    bool known = false;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(plain); ++k) known |= reinterpret_cast<PyObject*>(Py_TYPE(x)) == PyTuple_GET_ITEM(plain, k);
    yes = known;
    if (!yes) continue;
    PyObject* const layout = PyObject_GetAttr(x, names().layout);
    if (layout == nullptr) return PlainCall::error;
    yes = layout == strided;
    Py_DECREF(layout);
    // A lazily negated tensor and one of zeros without memory are not what lies at their address.
    const int on_cpu = truth(PyObject_GetAttr(x, names().is_cpu)), negated = truth(PyObject_CallMethodNoArgs(x, names().is_neg)),
              zeros = truth(PyObject_CallMethodNoArgs(x, names().is_zeros));
    if (on_cpu < 0 || negated < 0 || zeros < 0) return PlainCall::error;
    yes = yes && on_cpu && !negated && !zeros;
  }
  return yes ? PlainCall::yes : PlainCall::no;
}

uintptr_t address(PyObject* tensor) {
  if (tensor == Py_None) return 0;
  const auto pointer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, names().data_ptr));
  if (!pointer) throw py::error_already_set();
  const auto result = static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(pointer.ptr()));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

Dtype dtype(PyObject* of) {
  const auto named = [](const char* name) { return py::object(py::module_::import("torch").attr(name)).release().ptr(); };  // they never go away
  static PyObject* const known[] = {named("float32"), named("bfloat16"), named("float16"), named("float64")};  // as in Dtype
  for (int i = 0; i < 4; ++i) {
    if (of == known[i]) return static_cast<Dtype>(i);
  }
  throw py::value_error("unsupported dtype " + std::string(py::str(of)));
}

Values values(PyObject* tensor) {
  if (tensor == Py_None) return {nullptr, Dtype::float32, 0};
  const auto type = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().dtype));
  const auto strides = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, names().stride));
  if (!type || !strides || !PyTuple_Check(strides.ptr())) throw py::error_already_set();
  const int64_t stride = PyTuple_GET_SIZE(strides.ptr()) == 0 ? 0 : PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), 0));
  return {reinterpret_cast<const void*>(address(tensor)), dtype(type.ptr()), stride};
}

int64_t length(PyObject* tensor) {
  const auto shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().shape));
  if (!shape || !PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) == 0) throw py::value_error("offsets must have one dimension");
  return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 0));
}

Hierarchy hierarchy(PyObject* token_offsets, PyObject* sequence_offsets, int64_t tokens) {
  return {reinterpret_cast<const int64_t*>(address(token_offsets)), reinterpret_cast<const int64_t*>(address(sequence_offsets)), tokens,
          length(token_offsets) - 1, length(sequence_offsets) - 1};
}

}  // namespace acpo
