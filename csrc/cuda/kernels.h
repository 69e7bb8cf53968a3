// Every rule's kernels: one for each pair of what parameters and gradients hold, and one that only scans.
#pragma once
#include "../plan.h"

namespace dk::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kPairs = 7;
constexpr auto kNone = static_cast<Type>(-1);

struct Kernel {
  Type weights, gradient;
  const void* function;
};

}  // namespace dk::cuda
