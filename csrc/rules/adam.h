#pragma once
#include "rule.h"

namespace dk::DK_ARCH {

struct AdamRow : CommonRow {
  double beta1, beta2, one_minus_beta1, one_minus_beta2, eps, amsgrad, bias_correction;
};

/// Adam (Kingma and Ba 2015) and AMSGrad (Reddi et al. 2018) with torch's semantics. The bias corrections
/// 1/(1 - beta1^k) and 1/sqrt(1 - beta2^k) are scales, 1 without them.
template <class T>
struct Adam : Common<T> {
  using Row = AdamRow;
  static constexpr const char* kFields[] = {DK_COMMON_FIELDS,  "beta1", "beta2",   "one_minus_beta1",
                                            "one_minus_beta2", "eps",   "amsgrad", "bias_correction"};
  static constexpr const char* kStateKeys[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr int kStates = 3;
  static constexpr bool kDivides = true;
  static constexpr int kAmsgrad = 1;
  static constexpr int kVariants = 2;
  static constexpr bool kUses[kVariants][kStates] = {{true, true, false}, {true, true, true}};
  static constexpr bool kConcludes[kVariants] = {true, true};

  T one_minus_beta1, beta2, one_minus_beta2, mean_scale, root_scale, eps;
  int variant;

  DK_INLINE Adam(const Row& row, const Moment& now)
      : Common<T>(row, now),
        one_minus_beta1(static_cast<T>(row.one_minus_beta1)),
        beta2(static_cast<T>(row.beta2)),
        one_minus_beta2(static_cast<T>(row.one_minus_beta2)),
        mean_scale(static_cast<T>(1 / seen(row, row.beta1, now.k))),
        root_scale(static_cast<T>(1 / std::sqrt(seen(row, row.beta2, now.k)))),
        eps(static_cast<T>(row.eps)),
        variant(row.amsgrad != 0 ? kAmsgrad : 0) {}

  /// The weight of all gradients in an average after k steps; 1 without bias correction.
  DK_INLINE static double seen(const Row& row, double beta, std::int64_t k) {
    return row.bias_correction == 0 ? 1 : 1 - std::pow(beta, static_cast<double>(k));
  }

  template <int V>
  DK_INLINE T direction(T w, T g, T (&s)[kStates], T) const {
    const T d = this->gradient(w, g);
    s[0] = s[0] + one_minus_beta1 * (d - s[0]);
    s[1] = this->average(s[1], d, beta2, one_minus_beta2);
    if constexpr (V == kAmsgrad) {
      s[2] = s[1] > s[2] ? s[1] : s[2];
      s[2] = s[1] != s[1] ? s[1] : s[2];  // torch.maximum: a NaN on either side stays one
    }
    return conclude<V>(s);
  }

  template <int V>
  DK_INLINE T conclude(const T (&s)[kStates]) const {
    return mean_scale * s[0] / (root_scale * root(s[V == kAmsgrad ? 2 : 1]) + eps);
  }
};

}  // namespace dk::DK_ARCH
