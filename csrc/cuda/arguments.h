// A plan from the numbers that Python has of it.
#pragma once
#include <array>
#include <cstdint>
#include <utility>

#include "../plan.h"

namespace dk::cuda {

/// Addresses, in the workers' memory: items, layers, gradients, rows, slots, arrived, published, reports,
/// verdict, clock.
using Tables = std::array<std::intptr_t, 10>;

/// How many: items, scans, the first layer, layers, slots.
using Counts = std::array<std::int64_t, 5>;

/// An address, or 0 and a value.
using Scalar = std::pair<std::intptr_t, double>;

inline Plan plan_of(const Tables& tables, const Counts& counts, const Scalar& grad_scale,
                    const Scalar& found_inf, double max_grad_norm, bool skip_nonfinite, bool judged) {
  Plan plan{};
  const auto at = [&]<class T>(std::size_t i, T*& pointer) { pointer = reinterpret_cast<T*>(tables[i]); };
  at(0, plan.items);
  at(1, plan.layers);
  at(2, plan.gradients);
  at(3, plan.rows);
  at(4, plan.slots);
  at(5, plan.arrived);
  at(6, plan.published);
  at(7, plan.reports);
  at(8, plan.verdict);
  at(9, plan.clock);
  plan.n_items = counts[0];
  plan.n_scans = counts[1];
  plan.first_layer = counts[2];
  plan.n_layers = counts[3];
  plan.n_slots = counts[4];
  plan.grad_scale = {reinterpret_cast<const float*>(grad_scale.first), grad_scale.second};
  plan.found_inf = {reinterpret_cast<const float*>(found_inf.first), found_inf.second};
  plan.max_grad_norm = max_grad_norm;
  plan.skip_nonfinite = skip_nonfinite;
  plan.judged = judged;
  return plan;
}

}  // namespace dk::cuda
