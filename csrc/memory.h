// Whether tensors still lie in memory as they did, asked of torch through DLPack: some 60 ns a tensor, where
// Python's attributes take 500.
//
// Note [Negated views]. DLPack does not tell of a tensor's negative bit. Only the imaginary part of a lazily
// conjugated tensor has one, and every stride of that is even, as its views' are. So tensors that are such by
// their strides are left to the caller, and no others (but for what as_strided or torch._neg_view makes).
#pragma once
#include <Python.h>

#include <algorithm>
#include <span>
#include <vector>

#include "dlpack.h"

namespace dk {

class Memory {
 public:
  using Tensors = std::span<PyObject* const>;  // of tensors and Nones

  /// What a capsule holds (torch.Tensor.__dlpack_c_exchange_api__); nullptr where dlpack.h does not know it.
  static const DLExchange* exchange_in(PyObject* capsule) {
    constexpr const char* kName = "dlpack_exchange_api";
    if (PyCapsule_IsValid(capsule, kName) == 0) return nullptr;
    const auto* exchange = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule, kName));
    return exchange->major == 1 && exchange->look != nullptr ? exchange : nullptr;
  }

  explicit Memory(const DLExchange& exchange) : exchange_(exchange) {}

  /// Look at each tensor; false, with Python's error set, at one without memory. Once.
  bool learn(Tensors tensors) {
    for (PyObject* const tensor : tensors) {
      Seen seen{};
      if (tensor != Py_None) {
        DLTensor now;
        if (exchange_.look(tensor, &now) != 0) return false;
        seen = {Py_TYPE(tensor), now.device, now.dtype, now.ndim};
        shapes_.insert(shapes_.end(), now.shape, now.shape + now.ndim);
        shapes_.insert(shapes_.end(), now.strides, now.strides + now.ndim);
        bool even = true;
        for (int d = 0; d < now.ndim; ++d) even &= now.shape[d] <= 1 || now.strides[d] % 2 == 0;
        if (even) doubtful_.push_back(static_cast<std::int64_t>(seen_.size()));
      }
      seen_.push_back(seen);
    }
    objects_.resize(seen_.size());
    addresses_.resize(seen_.size());
    fits(tensors);
    return true;
  }

  /// Whether tensors of the same types, dtypes, devices, shapes and strides stand in the same places. If so
  /// `addresses` tells where they lie now, and `renewed` whether any is another object than before.
  bool fits(Tensors tensors) {
    if (tensors.size() != seen_.size()) return false;
    const std::int64_t* shape = shapes_.data();
    renewed_ = false;
    for (std::size_t i = 0; i < seen_.size(); ++i) {
      PyObject* const tensor = tensors[i];
      const Seen& seen = seen_[i];
      if (tensor == Py_None && seen.type == nullptr) continue;
      if (Py_TYPE(tensor) != seen.type) return false;  // and nobody is asked who does not know DLPack
      DLTensor now;
      if (exchange_.look(tensor, &now) != 0) {
        PyErr_Clear();  // a sparse tensor, say
        return false;
      }
      if (now.device != seen.device || now.dtype != seen.dtype || now.ndim != seen.ndim) return false;
      for (const std::int64_t* of : {now.shape, now.strides}) {
        if (!std::equal(of, of + seen.ndim, shape)) return false;
        shape += seen.ndim;
      }
      renewed_ |= tensor != objects_[i];
      objects_[i] = tensor;
      addresses_[i] = reinterpret_cast<std::intptr_t>(now.data) + static_cast<std::intptr_t>(now.byte_offset);
    }
    return true;
  }

  /// As `fits` found them; 0 for None.
  std::vector<std::int64_t>& addresses() { return addresses_; }
  bool renewed() const { return renewed_; }
  /// The places whose tensors may be negated: Note [Negated views].
  std::vector<std::int64_t>& doubtful() { return doubtful_; }

 private:
  struct Seen {
    PyTypeObject* type;  // only compared
    DLDevice device;
    DLDataType dtype;
    std::int32_t ndim;
  };

  const DLExchange& exchange_;
  std::vector<Seen> seen_;
  std::vector<std::int64_t> shapes_;  // of each: its shape, then its strides
  std::vector<PyObject*> objects_;    // only compared
  std::vector<std::int64_t> addresses_, doubtful_;
  bool renewed_ = false;
};

}  // namespace dk
