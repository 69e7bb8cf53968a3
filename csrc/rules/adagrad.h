#pragma once
#include "rule.h"

namespace dk::DK_ARCH {

struct AdagradRow : CommonRow {
  double eps;
};

/// AdaGrad (Duchi et al. 2011) with torch's semantics; the rate has its decay in it.
template <class T>
struct Adagrad : Common<T> {
  using Row = AdagradRow;
  static constexpr const char* kFields[] = {DK_COMMON_FIELDS, "eps"};
  static constexpr const char* kStateKeys[] = {"sum"};
  static constexpr int kStates = 1;
  static constexpr bool kDivides = true;
  static constexpr int kVariants = 1;
  static constexpr bool kUses[kVariants][kStates] = {{true}};
  static constexpr bool kConcludes[kVariants] = {false};

  T eps;
  static constexpr int variant = 0;

  DK_INLINE Adagrad(const Row& row, const Moment& now) : Common<T>(row, now), eps(static_cast<T>(row.eps)) {}

  template <int V>
  DK_INLINE T direction(T w, T g, T (&s)[kStates], T) const {
    const T d = this->gradient(w, g);
    s[0] = s[0] + d * d;
    return d / (root(s[0]) + eps);
  }
};

}  // namespace dk::DK_ARCH
