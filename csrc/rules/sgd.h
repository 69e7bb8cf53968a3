#pragma once
#include "rule.h"

namespace dk::DK_ARCH {

struct SgdRow : CommonRow {
  double momentum, one_minus_dampening, nesterov;
};

/// SGD, momentum and Nesterov with torch's semantics. The first step's b = d needs no case of its own:
/// buffers start at zero and the first step is undamped.
template <class T>
struct Sgd : Common<T> {
  using Row = SgdRow;
  static constexpr const char* kFields[] = {DK_COMMON_FIELDS, "momentum", "one_minus_dampening", "nesterov"};
  static constexpr const char* kStateKeys[] = {"momentum_buffer"};
  static constexpr int kStates = 1;
  static constexpr bool kDivides = false;
  static constexpr int kPlain = 0, kMomentum = 1, kNesterov = 2;
  static constexpr int kVariants = 3;
  static constexpr bool kUses[kVariants][kStates] = {{false}, {true}, {true}};
  static constexpr bool kConcludes[kVariants] = {false, true, false};

  T momentum, one_minus_dampening;
  int variant;

  DK_INLINE Sgd(const Row& row, const Moment& now)
      : Common<T>(row, now),
        momentum(static_cast<T>(row.momentum)),
        one_minus_dampening(static_cast<T>(now.k == 1 ? 1 : row.one_minus_dampening)),
        variant(row.momentum == 0   ? kPlain
                : row.nesterov == 0 ? kMomentum
                                    : kNesterov) {}

  template <int V>
  DK_INLINE T direction(T w, T g, T (&s)[kStates], T in) const {
    const T x = in * this->gradient(w, g);
    if constexpr (V == kPlain) return x;
    s[0] = momentum * s[0] + one_minus_dampening * x;
    return V == kNesterov ? x + momentum * s[0] : conclude<V>(s);
  }

  template <int V>
  DK_INLINE T conclude(const T (&s)[kStates]) const {
    return s[0];
  }
};

}  // namespace dk::DK_ARCH
