// One entry per instruction set, dispatched once, outermost.
#pragma once
#include "../plan.h"

namespace dk {

/// Runs one worker of `workers` through the plan.
using Worker = void (*)(const Plan&, int workers);

struct Target {
  const char* name;
  bool supported;         // by the processor we run on
  const Worker* workers;  // one per rule, in the order of rules/all.h
};

}  // namespace dk
