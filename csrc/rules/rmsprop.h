#pragma once
#include "rule.h"

namespace dk::DK_ARCH {

struct RmspropRow : CommonRow {
  double alpha, one_minus_alpha, eps_inside, eps_outside, momentum, centered;
};

/// RMSprop with torch's semantics, and TensorFlow 1's root: sqrt(v + eps_inside) + eps_outside, one of the
/// two being 0.
template <class T>
struct Rmsprop : Common<T> {
  using Row = RmspropRow;
  static constexpr const char* kFields[] = {DK_COMMON_FIELDS, "alpha",    "one_minus_alpha", "eps_inside",
                                            "eps_outside",    "momentum", "centered"};
  static constexpr const char* kStateKeys[] = {"square_avg", "grad_avg", "momentum_buffer"};
  static constexpr int kStates = 3;
  static constexpr bool kDivides = true;
  static constexpr int kCentered = 1, kMomentum = 2;
  static constexpr int kVariants = 4;
  static constexpr bool kUses[kVariants][kStates] = {
      {true, false, false}, {true, true, false}, {true, false, true}, {true, true, true}};
  static constexpr bool kConcludes[kVariants] = {false, false, true, true};

  T alpha, one_minus_alpha, eps_inside, eps_outside, momentum;
  int variant;

  DK_INLINE Rmsprop(const Row& row, const Moment& now)
      : Common<T>(row, now),
        alpha(static_cast<T>(row.alpha)),
        one_minus_alpha(static_cast<T>(row.one_minus_alpha)),
        eps_inside(static_cast<T>(row.eps_inside)),
        eps_outside(static_cast<T>(row.eps_outside)),
        momentum(static_cast<T>(row.momentum)),
        variant((row.centered != 0 ? kCentered : 0) | (row.momentum != 0 ? kMomentum : 0)) {}

  template <int V>
  DK_INLINE T direction(T w, T g, T (&s)[kStates], T in) const {
    const T d = this->gradient(w, g);
    s[0] = this->average(s[0], d, alpha, one_minus_alpha);
    T variance = s[0];
    if constexpr (V & kCentered) {
      s[1] = s[1] + one_minus_alpha * (d - s[1]);
      variance = variance - s[1] * s[1];
      variance = variance < 0 ? T(0) : variance;  // rounding may leave it below 0; a NaN stays one
    }
    const T x = in * (d / (root(variance + eps_inside) + eps_outside));
    if constexpr (!(V & kMomentum)) return x;
    s[2] = momentum * s[2] + x;
    return conclude<V>(s);
  }

  template <int V>
  DK_INLINE T conclude(const T (&s)[kStates]) const {
    return s[2];
  }
};

}  // namespace dk::DK_ARCH
