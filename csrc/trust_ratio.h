// The bounded trust ratio: spec of LARS (You, Gitman, Ginsburg 2017) and DATE (You et al. 2019, Algorithm 1),
// once for all rules.
#pragma once
#include <cmath>
#include <limits>

#include "arch.h"
#include "plan.h"
#include "row.h"

namespace dk::DK_ARCH {

// Not std::min / std::max: those swallow a NaN or keep it by argument order.
DK_INLINE double clamp(double x, double lower, double upper) {
  return x < lower ? lower : x > upper ? upper : x;
}

/// r = clamp(coefficient * phi(||w||) / (||x|| + decay*||w|| + eps), lower, upper). A norm that is not finite
/// gives NaN: decided before clamping, which would turn inf/inf into a bound. A zero norm takes `zero_norm`,
/// bounded too. The moving bounds are AdaBound's (Luo et al. 2019), which DATE names as the model of its own.
DK_INLINE LayerReport trust_ratio(Sums sums, const CommonRow& t, std::int64_t k) {
  const double w = std::sqrt(sums.weight), x = std::sqrt(sums.measured);
  const double denominator = x + t.added_decay * w;
  if (!(w + denominator <= std::numeric_limits<double>::max())) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {w, x, nan, nan, 0, 0};
  }
  double raw = t.zero_norm;
  if (w > 0 && denominator > 0) {
    raw = t.coefficient * clamp(w, t.weight_norm_lower, t.weight_norm_upper) / (denominator + t.trust_eps);
    if (t.clip_by_lr != 0) {
      const double lr = rate(t, k);
      raw = raw < lr ? raw / lr : 1;  // min(raw / lr, 1), and 1 where lr is 0
    }
  }
  double lower = t.lower, upper = t.upper;
  if (t.moving != 0) {
    const auto step = static_cast<double>(k);
    lower = t.final * (1 - 1 / (t.gamma * step + 1));
    upper = t.final * (1 + 1 / (t.gamma * step));
  }
  const double ratio = clamp(raw, lower, upper);
  return {w, x, raw, ratio, raw < ratio ? -1.0 : raw > ratio ? 1.0 : 0.0, 0};
}

}  // namespace dk::DK_ARCH
