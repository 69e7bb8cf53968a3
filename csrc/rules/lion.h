#pragma once
#include "rule.h"

namespace dk::DK_ARCH {

struct LionRow : CommonRow {
  double beta1, one_minus_beta1, beta2, one_minus_beta2;
};

/// Lion (Chen et al. 2023): the sign of one average of the gradient, while a slower one is kept.
template <class T>
struct Lion : Common<T> {
  using Row = LionRow;
  static constexpr const char* kFields[] = {DK_COMMON_FIELDS, "beta1", "one_minus_beta1", "beta2",
                                            "one_minus_beta2"};
  static constexpr const char* kStateKeys[] = {"exp_avg"};
  static constexpr int kStates = 1;
  static constexpr bool kDivides = false;
  static constexpr int kVariants = 1;
  static constexpr bool kUses[kVariants][kStates] = {{true}};
  static constexpr bool kConcludes[kVariants] = {false};

  T beta1, one_minus_beta1, beta2, one_minus_beta2;
  static constexpr int variant = 0;

  DK_INLINE Lion(const Row& row, const Moment& now)
      : Common<T>(row, now),
        beta1(static_cast<T>(row.beta1)),
        one_minus_beta1(static_cast<T>(row.one_minus_beta1)),
        beta2(static_cast<T>(row.beta2)),
        one_minus_beta2(static_cast<T>(row.one_minus_beta2)) {}

  template <int V>
  DK_INLINE T direction(T w, T g, T (&s)[kStates], T) const {
    const T d = this->gradient(w, g);
    const T c = beta1 * s[0] + one_minus_beta1 * d;
    s[0] = beta2 * s[0] + one_minus_beta2 * d;
    return c > 0 ? T(1) : c < 0 ? T(-1) : c;  // a NaN stays one
  }
};

}  // namespace dk::DK_ARCH
