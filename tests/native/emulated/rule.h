#pragma once
#include "cuda/kernels.h"

struct Emulated {
  int weights, gradient;
  void (*run)(const dk::cuda::Launch&, unsigned blocks);
};
