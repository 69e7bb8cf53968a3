// The contract of a rule (see rules/sgd.h for the smallest one):
//
//   Row                     its hyper-parameters as doubles, CommonRow first; kFields names them in order
//   kStateKeys, kStates     torch's keys of its states, in order, and how many there are
//   kVariants, kUses        loops it has, and which states each reads and writes; `variant` says which one
//   the row asks for direction<V>(w, g, s, in)  advances the states in s and returns the direction u; `in`
//   scales what enters a momentum buffer
//
// A rule is made from a row once a chunk, holds its numbers in the arithmetic's type, and knows neither
// chunks nor tensors.
#pragma once
#include <cmath>

#include "../arch.h"

namespace dk::DK_ARCH {

/// How every rule prepares the gradient, and where the rate and the ratio go.
struct CommonRow {
  double lr, lr_inside, ratio_inside, gradient_scale, decay, measured_decay;
};
#define DK_COMMON_FIELDS "lr", "lr_inside", "ratio_inside", "gradient_scale", "decay", "measured_decay"

/// `in` multiplies what enters the momentum buffer, `out` the direction.
template <class T>
struct Scale {
  T in, out;
};

template <class T>
struct Common {
  using Value = T;
  double lr, lr_inside, ratio_inside;
  T scale, decay, measured_decay;

  Common(const CommonRow& row, double clip)
      : lr(row.lr),
        lr_inside(row.lr_inside),
        ratio_inside(row.ratio_inside),
        scale(static_cast<T>(row.gradient_scale * clip)),
        decay(static_cast<T>(row.decay)),
        measured_decay(static_cast<T>(row.measured_decay)) {}

  /// The three forms of momentum scaling are one formula: rate and ratio stand either inside the buffer or
  /// outside it.
  DK_INLINE Scale<T> place(double ratio) const {
    const double in = (lr_inside != 0 ? lr : 1) * (ratio_inside != 0 ? ratio : 1);
    const double out = (lr_inside != 0 ? 1 : lr) * (ratio_inside != 0 ? 1 : ratio);
    return {static_cast<T>(in), static_cast<T>(out)};
  }

  // Without decay the weights stay out of it: 0 * inf would be NaN where torch has none.
  DK_INLINE T gradient(T w, T g) const { return decay == 0 ? scale * g : scale * g + decay * w; }
  DK_INLINE T measured(T w, T g) const {
    return measured_decay == 0 ? scale * g : scale * g + measured_decay * w;
  }
};

DK_INLINE float root(float x) { return __builtin_sqrtf(x); }
DK_INLINE double root(double x) { return __builtin_sqrt(x); }

}  // namespace dk::DK_ARCH
