#pragma once
#include "plan.h"

constexpr int kPairs = 7;

struct Emulated {
  int weights, gradient;
  void (*run)(const dk::Plan&, unsigned blocks);
};
