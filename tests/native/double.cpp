// The whole engine with its rules in double, behind a C interface. Compiled with -DDK_ARCH=baseline and
// linked with csrc/cpu/launch.cpp, it takes the place of the baseline's float workers.
#include <omp.h>

#include <vector>

#include "cpu/launch.h"
#include "cpu/thread.h"
#include "rules/all.h"

namespace dk::DK_ARCH {
namespace {

template <template <class> class Rule>
void work(const Plan& plan, int workers) {
  Thread thread(workers);
  run_worker<Thread, Rule<double>>(thread, plan);
}

}  // namespace

extern const Worker kWorkers[];
#define DK_WORKER(name, Rule) work<Rule>,
const Worker kWorkers[] = {DK_FOR_EACH_RULE(DK_WORKER)};

}  // namespace dk::DK_ARCH

extern "C" {

int engine_layer_size() { return sizeof(dk::Layer); }
int engine_item_size() { return sizeof(dk::Item); }

dk::Engine* engine_make(int family, const dk::Layer* layers, std::int64_t n_layers, const dk::Item* items,
                        std::int64_t n_items) {
  return new dk::Engine(family, dk::targets()[0], {layers, layers + n_layers}, {items, items + n_items});
}

void engine_free(dk::Engine* engine) { delete engine; }

/// Writes (options, step) of each distinct row; returns how many there are, at most one a layer.
std::int64_t engine_assign_rows(dk::Engine* engine, std::int64_t* keys) {
  const auto rows = engine->assign_rows();
  for (const dk::RowKey& key : rows) {
    *keys++ = key.options;
    *keys++ = key.step;
  }
  return static_cast<std::int64_t>(rows.size());
}

void engine_run(dk::Engine* engine, const double* rows, const dk::TrustRow* trust, int threads,
                double max_grad_norm, bool skip_nonfinite) {
  engine->run(rows, trust, threads, max_grad_norm, skip_nonfinite);
}

/// As engine_run, called by one thread of a parallel region. `levels` of nested regions may be active: with 1
/// the engine gets one thread, whatever it asks for. Returns the threads that the outer region had.
int engine_run_nested(dk::Engine* engine, const double* rows, const dk::TrustRow* trust, int threads,
                      double max_grad_norm, bool skip_nonfinite, int levels) {
  const int before = omp_get_max_active_levels();
  omp_set_max_active_levels(levels);
  int outer = 0;
#pragma omp parallel num_threads(2)
#pragma omp single
  {
    outer = omp_get_num_threads();
    engine->run(rows, trust, threads, max_grad_norm, skip_nonfinite);
  }
  omp_set_max_active_levels(before);
  return outer;
}

const dk::LayerReport* engine_reports(const dk::Engine* engine) { return engine->reports.data(); }

const dk::Verdict* engine_verdict(const dk::Engine* engine) { return &engine->verdict; }

}  // extern "C"
