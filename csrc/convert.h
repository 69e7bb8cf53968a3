// 16-bit weights and gradients to and from the arithmetic's float, in integers: the same bits on every
// instruction set, whether it has instructions for them or not, and in every denormal mode.
#pragma once
#include <cstdint>

#include "arch.h"
#include "plan.h"

namespace dk::DK_ARCH {

struct Bfloat16 {
  DK_INLINE static float widen(std::uint16_t x) { return __builtin_bit_cast(float, std::uint32_t{x} << 16); }

  /// To the nearest, ties to even.
  DK_INLINE static std::uint16_t narrow(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
};

struct Float16 {
  DK_INLINE static float widen(std::uint16_t x) {
    constexpr std::uint32_t kRebias = 127 - 15;
    const std::uint32_t magnitude = x & 0x7fff, sign = static_cast<std::uint32_t>(x & 0x8000) << 16;
    // An exponent of all ones is rebiased to all ones.
    const std::uint32_t normal = (magnitude << 13) + ((magnitude < 0x7c00 ? kRebias : 2 * kRebias) << 23);
    // Subnormal: the magnitude counts 2^-24. It goes through int, which is what vectors convert.
    const auto subnormal = __builtin_bit_cast(
        std::uint32_t, static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
    return __builtin_bit_cast(float, sign | (magnitude < 0x0400 ? subnormal : normal));
  }

  /// To the nearest, ties to even.
  DK_INLINE static std::uint16_t narrow(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    const std::uint32_t magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    const std::uint32_t normal = (magnitude - ((127u - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Subnormal: the last bit counts 2^-24, as that of a float in [0.5, 1) does.
    const std::uint32_t subnormal =
        __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) -
        __builtin_bit_cast(std::uint32_t, 0.5f);
    const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const std::uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return static_cast<std::uint16_t>(sign | (magnitude < 0x477ff000 ? finite : large));
  }
};

template <class Format>
inline void widen(const std::uint16_t* from, float* to, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = Format::widen(from[i]);
}

template <class Format>
inline void narrow(const float* from, std::uint16_t* to, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = Format::narrow(from[i]);
}

}  // namespace dk::DK_ARCH
