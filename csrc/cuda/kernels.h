// Every rule's kernels: one for each pair of what parameters and gradients hold, and one that only scans.
#pragma once
#include <cstddef>

#include "../plan.h"

namespace dk::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kPairs = 7;
constexpr auto kNone = static_cast<Type>(-1);

struct Kernel {
  Type weights, gradient;
  const void* function;
};

/// What a launch carries: a plan, and the words that it reads, all rows and then all gradients' addresses,
/// where they are few enough for the 4 KB of parameters that every driver takes. More, as newer drivers take,
/// would be copied at every launch, few or not.
struct Launch {
  static constexpr std::size_t kCarried = (4096 - sizeof(Plan)) / sizeof(std::int64_t) - 1;
  Plan plan{};
  std::int64_t n_carried = 0;
  std::int64_t carried[kCarried] = {};
};
static_assert(sizeof(Launch) <= 4096);

}  // namespace dk::cuda
