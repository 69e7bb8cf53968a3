// The contract of a rule (see rules/adagrad.h for the smallest one):
//
//   Row                   its hyper-parameters as doubles, CommonRow first; kFields names them in order. They
//                         are options alone: what a step adds is worked out in the constructor
//   kStateKeys, kStates   torch's keys of its states, in order, and how many there are
//   kDivides              whether its direction divides
//   kVariants, kUses      loops it has, and which states each reads and writes; `variant` says which one the
//                         row asks for
//   direction<V>(w, g, s, in)
//                         advances the states in s and returns the direction u; `in` scales what enters a
//                         momentum buffer
//   kConcludes            variants whose direction is a function of the advanced states alone:
//   conclude<V>(s)        that function
//
// A rule is made from a row and a moment once a chunk, holds its numbers in the arithmetic's type, and knows
// neither chunks nor tensors.
#pragma once
#include <cmath>
#include <type_traits>
#include <utility>

#include "../arch.h"
#include "../row.h"

namespace dk::DK_ARCH {

/// `in` multiplies what enters the momentum buffer, `out` the direction.
template <class T>
struct Scale {
  T in, out;
};

template <class T>
struct Common {
  using Value = T;
  double lr;
  bool lr_inside, ratio_inside, of_update;
  T scale, gradient_decay, update_decay, weight_scale, measured_decay;

  DK_INLINE Common(const CommonRow& row, const Moment& now)
      : lr(rate(row, now.k)),
        lr_inside(row.lr_inside != 0),
        ratio_inside(row.ratio_inside != 0),
        of_update(row.of_update != 0),
        scale(static_cast<T>(row.sign / now.grad_scale * now.clip)),
        gradient_decay(static_cast<T>(row.gradient_decay)),
        update_decay(static_cast<T>(row.update_decay)),
        weight_scale(static_cast<T>(1 - lr * row.weights_decay)),
        measured_decay(static_cast<T>(row.measured_decay)) {}

  /// The three forms of momentum scaling are one formula: rate and ratio stand either inside the buffer or
  /// outside it.
  DK_INLINE Scale<T> place(double ratio) const {
    const double in = (lr_inside ? lr : 1) * (ratio_inside ? ratio : 1);
    const double out = (lr_inside ? 1 : lr) * (ratio_inside ? 1 : ratio);
    return {static_cast<T>(in), static_cast<T>(out)};
  }

  // Without decay the weights stay out of it: 0 * inf would be NaN where torch has none.
  DK_INLINE T gradient(T w, T g) const {
    return gradient_decay == 0 ? scale * g : scale * g + gradient_decay * w;
  }
  DK_INLINE T measured(T w, T g) const {
    return measured_decay == 0 ? scale * g : scale * g + measured_decay * w;
  }

  /// An average of squares, advanced; multiplied as torch does, which overflows later than the square.
  DK_INLINE static T average(T v, T x, T decay, T one_minus_decay) {
    return decay * v + one_minus_decay * x * x;
  }

  /// The update of a direction. Its decay is scaled as what enters a momentum buffer is, so that all forms
  /// multiply it by rate and ratio.
  DK_INLINE T update(T w, T u, T in) const { return update_decay == 0 ? u : u + in * update_decay * w; }

  /// The weights after an update; `weight_scale` is 1 - rate * decay where decay is of the weights, else 1.
  DK_INLINE T applied(T w, T u, T out) const { return weight_scale * w - out * u; }
};

/// f(variant) with the rule's variant as a constant.
template <class Rule, class F>
DK_INLINE void with_variant(const Rule& rule, F f) {
  const auto each = [&]<int... V>(std::integer_sequence<int, V...>) {
    (void)((rule.variant == V && (f(std::integral_constant<int, V>()), true)) || ...);
  };
  each(std::make_integer_sequence<int, Rule::kVariants>());
}

DK_INLINE float root(float x) { return __builtin_sqrtf(x); }
DK_INLINE double root(double x) { return __builtin_sqrt(x); }

}  // namespace dk::DK_ARCH
