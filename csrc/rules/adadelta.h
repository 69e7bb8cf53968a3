#pragma once
#include "rule.h"

namespace dk::DK_ARCH {

struct AdadeltaRow : CommonRow {
  double rho, one_minus_rho, eps;
};

/// Adadelta (Zeiler 2012) with torch's semantics: acc_delta averages the rule's own direction, without rate
/// and ratio.
template <class T>
struct Adadelta : Common<T> {
  using Row = AdadeltaRow;
  static constexpr const char* kFields[] = {DK_COMMON_FIELDS, "rho", "one_minus_rho", "eps"};
  static constexpr const char* kStateKeys[] = {"square_avg", "acc_delta"};
  static constexpr int kStates = 2;
  static constexpr bool kDivides = true;
  static constexpr int kVariants = 1;
  static constexpr bool kUses[kVariants][kStates] = {{true, true}};
  static constexpr bool kConcludes[kVariants] = {false};

  T rho, one_minus_rho, eps;
  static constexpr int variant = 0;

  DK_INLINE Adadelta(const Row& row, const Moment& now)
      : Common<T>(row, now),
        rho(static_cast<T>(row.rho)),
        one_minus_rho(static_cast<T>(row.one_minus_rho)),
        eps(static_cast<T>(row.eps)) {}

  template <int V>
  DK_INLINE T direction(T w, T g, T (&s)[kStates], T) const {
    const T d = this->gradient(w, g);
    s[0] = this->average(s[0], d, rho, one_minus_rho);
    const T u = root(s[1] + eps) / root(s[0] + eps) * d;
    s[1] = this->average(s[1], u, rho, one_minus_rho);
    return u;
  }
};

}  // namespace dk::DK_ARCH
