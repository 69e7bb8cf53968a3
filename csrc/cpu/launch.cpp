#include "launch.h"

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "fp_mode.h"

#define DK_ARCH host  // for the names and fields of the rules; no formula runs from here
#include "../rules/all.h"

namespace dk {

#define DK_DECLARE(arch)          \
  namespace arch {                \
  extern const Worker kWorkers[]; \
  }
DK_DECLARE(baseline)
#ifdef DK_X86_TARGETS
DK_DECLARE(avx2)
DK_DECLARE(avx512)
#endif

std::span<const Target> targets() {
#ifdef DK_X86_TARGETS
  __builtin_cpu_init();
  static const Target kTargets[] = {
      {"baseline", true, baseline::kWorkers},
      {"avx2", __builtin_cpu_supports("avx2") != 0, avx2::kWorkers},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       avx512::kWorkers},
  };
#else
  static const Target kTargets[] = {{"baseline", true, baseline::kWorkers}};
#endif
  return kTargets;
}

std::span<const Family> families() {
#define DK_FAMILY(name, Rule) {name, host::Rule<float>::kFields, host::Rule<float>::kStateKeys},
  static const Family kFamilies[] = {DK_FOR_EACH_RULE(DK_FAMILY)};
  return kFamilies;
}

#define DK_CHECK_FIELDS(name, Rule)                                                                        \
  static_assert(sizeof(host::Rule<float>::Row) == sizeof(double) * std::size(host::Rule<float>::kFields)); \
  static_assert(std::size(host::Rule<float>::kStateKeys) == host::Rule<float>::kStates &&                  \
                host::Rule<float>::kStates <= kMaxStates);
DK_FOR_EACH_RULE(DK_CHECK_FIELDS)

const char* openmp_library() {
  Dl_info info{};
  return dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) != 0 ? info.dli_fname : "unknown";
}

namespace {

/// Elements per worker below which another worker costs more than it brings; torch's own grain.
constexpr std::int64_t kGrain = 32768;

/// A float counts no further.
constexpr float kMostSteps = 1 << 24;

bool forked = false;

/// In a forked child the runtime's other threads are gone, and a parallel region would wait for them for
/// ever.
[[maybe_unused]] const int watch_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

std::int64_t leaves(std::int64_t size) { return (size + kLeaf - 1) / kLeaf; }

}  // namespace

Engine::Engine(int family, const Target& target, std::vector<Layer> layers_of_plan, std::vector<Item> items)
    : layers(std::move(layers_of_plan)),
      reports(layers.size()),
      worker_(target.workers[family]),
      items_(std::move(items)) {
  elements_ = 0;
  for (const Layer& layer : layers) elements_ += layer.size;
  scans_ = std::count_if(items_.begin(), items_.end(), [](const Item& i) { return i.kind == Kind::scan; });
  if (!layers.empty()) slots_.resize(layers.back().slot + leaves(layers.back().size));
  arrived_.resize(layers.size());
  published_.resize(layers.size());
  next_.resize(items_.size());
}

void Engine::check_counters() const {
  for (const Layer& layer : layers) {
    const float taken = layer.step != nullptr ? *layer.step : 0;
    if (!(taken >= 0 && taken <= kMostSteps)) {
      throw std::invalid_argument(std::to_string(&layer - layers.data()));
    }
  }
}

void Engine::run(const void* const* gradients, const double* rows, int threads, double grad_scale,
                 double max_grad_norm, bool skip_nonfinite) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  std::fill(reports.begin(), reports.end(), LayerReport{kNan, kNan, kNan, 1, 0, 0});
  verdict = {kNan, 1, 0};
  const Plan plan{.items = items_.data(),
                  .n_items = static_cast<std::int64_t>(items_.size()),
                  .n_scans = scans_,
                  .layers = layers.data(),
                  .first_layer = 0,
                  .n_layers = static_cast<std::int64_t>(layers.size()),
                  .gradients = gradients,
                  .rows = rows,
                  .grad_scale = {nullptr, grad_scale},
                  .found_inf = {nullptr, 0},
                  .judged = false,
                  .slots = slots_.data(),
                  .n_slots = static_cast<std::int64_t>(slots_.size()),
                  .arrived = arrived_.data(),
                  .published = published_.data(),
                  .next = next_.data(),
                  .reports = reports.data(),
                  .verdict = &verdict,
                  .clock = &clock_,
                  .max_grad_norm = max_grad_norm,
                  .skip_nonfinite = skip_nonfinite};
  const auto useful = static_cast<int>(std::min<std::int64_t>(threads, (elements_ + kGrain - 1) / kGrain));
  if (useful <= 1 || forked) {
    worker_(plan, 1);
  } else {
    const FpMode mode = fp_mode();
#pragma omp parallel num_threads(useful)
    {
      const ScopedFpMode scoped(mode);
      worker_(plan, omp_get_num_threads());  // nesting or a limit may give fewer than asked for
    }
  }
  if (verdict.skip != 0) skip();
}

void Engine::skip() {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  std::fill(reports.begin(), reports.end(), LayerReport{kNan, kNan, kNan, 1, 0, 1});
  verdict.skip = 1;
}

}  // namespace dk
