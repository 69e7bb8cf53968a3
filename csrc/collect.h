// Whether an optimizer still holds the layers of the step before, asked of its lists and dicts.
#pragma once
#include <Python.h>

namespace dk {

/// Where a reader of Python's objects stops.
enum class Found { kSame, kOthers, kError };

/// Whether the members of all groups are `params`, one after the other.
inline bool are_members(PyObject* groups, PyObject* params) {
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    PyObject* const members = PyList_GET_ITEM(groups, i);
    if (!PyList_Check(members)) return false;
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(members); ++j, ++at) {
      if (at == PyList_GET_SIZE(params) || PyList_GET_ITEM(members, j) != PyList_GET_ITEM(params, at))
        return false;
    }
  }
  return at == PyList_GET_SIZE(params);
}

/// Whether a dict holds these objects in this order.
inline bool are_values(PyObject* dict, PyObject* values) {
  if (!PyDict_Check(dict)) return false;
  Py_ssize_t at = 0, place = 0;
  PyObject* value;
  for (; PyDict_Next(dict, &place, nullptr, &value); ++at) {
    if (at == PyList_GET_SIZE(values) || value != PyList_GET_ITEM(values, at)) return false;
  }
  return at == PyList_GET_SIZE(values);
}

/// Bring a column of states up to what the layers' dicts hold under its key; others where one has come or
/// gone.
inline Found take_up(PyObject* saved, PyObject* key, PyObject* column) {
  if (!PyList_Check(column) || PyList_GET_SIZE(column) != PyList_GET_SIZE(saved)) return Found::kOthers;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(column); ++i) {
    PyObject* const of_layer = PyList_GET_ITEM(saved, i);
    if (!PyDict_Check(of_layer)) return Found::kOthers;
    PyObject* now = PyDict_GetItemWithError(of_layer, key);
    if (now == nullptr) {
      if (PyErr_Occurred() != nullptr) return Found::kError;
      now = Py_None;
    }
    PyObject* const before = PyList_GET_ITEM(column, i);
    if (now == before) continue;
    if (now == Py_None || before == Py_None) return Found::kOthers;
    PyList_SetItem(column, i, Py_NewRef(now));
  }
  return Found::kSame;
}

/// The layers' gradients, into a list of as many empty places; others where one has none.
inline Found take_gradients(PyObject* params, PyObject* grads) {
  static PyObject* const kName = PyUnicode_InternFromString("grad");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(grads); ++i) {
    if (i >= PyList_GET_SIZE(params)) return Found::kOthers;  // a .grad of the user's own may do anything
    PyObject* const grad = PyObject_GetAttr(PyList_GET_ITEM(params, i), kName);
    if (grad == nullptr) return Found::kError;
    PyList_SetItem(grads, i, grad);
    if (grad == Py_None) return Found::kOthers;
  }
  return Found::kSame;
}

}  // namespace dk
