// What of DLPack's binary interface (1.3, dlpack.h and its C exchange) this project asks: where a tensor
// lies, of torch itself, without a header or a library of torch's.
#pragma once
#include <cstdint>

extern "C" {

struct DLDevice {
  std::int32_t type, id;
  bool operator==(const DLDevice&) const = default;
};

struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
  bool operator==(const DLDataType&) const = default;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;  // of elements
  std::uint64_t byte_offset;
};

struct DLExchange {
  std::uint32_t major, minor;
  DLExchange* older;
  void* for_owned_tensors[3];
  /// 0, or -1 with Python's error set; what it points at is the tensor's.
  int (*look)(void* object, DLTensor* tensor);
};
}
