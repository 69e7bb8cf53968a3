// The numbers that every layer's options have, and those of them that its step decides.
#pragma once
#include <cstdint>

#include "arch.h"

namespace dk::DK_ARCH {

/// How every rule prepares the gradient, where the rate, the ratio and the weight decay go, what the ratio is
/// of, and its bounds. All doubles: rows arrive as arrays of doubles.
struct CommonRow {
  double lr, lr_address, lr_double,
      lr_decay;  // the address is an integer's bits: of a rate on the device, or 0
  double lr_inside, ratio_inside, sign, gradient_decay, update_decay, weights_decay, of_update,
      measured_decay;
  double coefficient, lower, upper, trust_eps, zero_norm, added_decay, weight_norm_lower, weight_norm_upper,
      clip_by_lr, moving, final, gamma;
};
#define DK_COMMON_FIELDS                                                                               \
  "lr", "lr_address", "lr_double", "lr_decay", "lr_inside", "ratio_inside", "sign", "gradient_decay",  \
      "update_decay", "weights_decay", "of_update", "measured_decay", "coefficient", "lower", "upper", \
      "trust_eps", "zero_norm", "added_decay", "weight_norm_lower", "weight_norm_upper", "clip_by_lr", \
      "moving", "final", "gamma"

/// The learning rate of step k, 1-based; only AdaGrad's decays by itself, as torch's.
DK_INLINE double rate(const CommonRow& row, std::int64_t k) {
  double lr = row.lr;
  const auto address = __builtin_bit_cast(std::uint64_t, row.lr_address);
  if (address != 0) {
    lr = row.lr_double != 0 ? *reinterpret_cast<const double*>(address)
                            : *reinterpret_cast<const float*>(address);
  }
  return lr / (1 + static_cast<double>(k - 1) * row.lr_decay);
}

/// What of a step a rule's numbers depend on, beside its row.
struct Moment {
  double grad_scale, clip;
  std::int64_t k;
};

}  // namespace dk::DK_ARCH
