// The bounded trust ratio: spec of LARS (You, Gitman, Ginsburg 2017) and DATE (You et al. 2019, Algorithm 1),
// once for all rules.
#pragma once
#include <cmath>
#include <limits>

#include "arch.h"
#include "plan.h"

namespace dk::DK_ARCH {

// Not std::min / std::max: those swallow a NaN or keep it by argument order.
DK_INLINE double clamp(double x, double lower, double upper) {
  return x < lower ? lower : x > upper ? upper : x;
}

/// r = clamp(coefficient * phi(||w||) / (||x|| + decay*||w|| + eps), lower, upper). A norm that is not finite
/// gives NaN: decided before clamping, which would turn inf/inf into a bound. A zero norm takes `zero_norm`,
/// bounded too.
DK_INLINE LayerReport trust_ratio(Sums sums, const TrustRow& t) {
  const double w = std::sqrt(sums.weight), x = std::sqrt(sums.measured);
  const double denominator = x + t.added_decay * w;
  if (!(w + denominator <= std::numeric_limits<double>::max())) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {w, x, nan, nan, 0, 0};
  }
  double raw = t.zero_norm;
  if (w > 0 && denominator > 0) {
    raw = t.coefficient * clamp(w, t.weight_norm_lower, t.weight_norm_upper) / (denominator + t.eps);
    if (t.clip_by_lr != 0) raw = raw < t.lr ? raw / t.lr : 1;  // min(raw / lr, 1), and 1 where lr is 0
  }
  const double ratio = clamp(raw, t.lower, t.upper);
  return {w, x, raw, ratio, raw < ratio ? -1.0 : raw > ratio ? 1.0 : 0.0, 0};
}

}  // namespace dk::DK_ARCH
