// A launch from the numbers that Python has of it.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <utility>

#include "kernels.h"

namespace dk::cuda {

/// Addresses, in the workers' memory: items, layers, words, slots, arrived, published, reports, verdict,
/// clock.
using Tables = std::array<std::intptr_t, 9>;

/// How many: items, scans, the first layer, layers, slots, words of all rows.
using Counts = std::array<std::int64_t, 6>;

/// An address, or 0 and a value.
using Scalar = std::pair<std::intptr_t, double>;

/// `carried`: what shall stand in the table of words when the step begins; empty where it stands there.
inline Launch launch_of(const Tables& tables, const Counts& counts, std::span<const std::int64_t> carried,
                        const Scalar& grad_scale, const Scalar& found_inf, double max_grad_norm,
                        bool skip_nonfinite, bool judged) {
  Launch launch;
  Plan& plan = launch.plan;
  const auto at = [&]<class T>(std::size_t i, T*& pointer) { pointer = reinterpret_cast<T*>(tables[i]); };
  at(0, plan.items);
  at(1, plan.layers);
  at(2, plan.rows);
  at(3, plan.slots);
  at(4, plan.arrived);
  at(5, plan.published);
  at(6, plan.reports);
  at(7, plan.verdict);
  at(8, plan.clock);
  plan.n_items = counts[0];
  plan.n_scans = counts[1];
  plan.first_layer = counts[2];
  plan.n_layers = counts[3];
  plan.n_slots = counts[4];
  plan.gradients = reinterpret_cast<const void* const*>(plan.rows + counts[5]);
  if (carried.size() > Launch::kCarried) throw std::invalid_argument("words: more than a launch carries");
  launch.n_carried = static_cast<std::int64_t>(carried.size());
  std::copy(carried.begin(), carried.end(), launch.carried);
  plan.grad_scale = {reinterpret_cast<const float*>(grad_scale.first), grad_scale.second};
  plan.found_inf = {reinterpret_cast<const float*>(found_inf.first), found_inf.second};
  plan.max_grad_norm = max_grad_norm;
  plan.skip_nonfinite = skip_nonfinite;
  plan.judged = judged;
  return launch;
}

}  // namespace dk::cuda
