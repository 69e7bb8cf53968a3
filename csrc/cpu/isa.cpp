// Compiled once per instruction set with -DDK_ARCH=<name> and its -m flags.
#include "../rules/all.h"
#include "target.h"
#include "thread.h"

namespace dk::DK_ARCH {
namespace {

template <template <class> class Rule>
void work(const Plan& plan, int workers) {
  Thread thread(workers);
  run_worker<Thread, Rule>(thread, plan);
}

}  // namespace

extern const Worker kWorkers[];
#define DK_WORKER(name, Rule) work<Rule>,
const Worker kWorkers[] = {DK_FOR_EACH_RULE(DK_WORKER)};

}  // namespace dk::DK_ARCH
