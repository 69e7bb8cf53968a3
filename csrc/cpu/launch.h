// The host's side of a step: the workspace of a plan, and the launch.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "target.h"

namespace dk {

/// Every target this build holds; the first one serves every processor.
std::span<const Target> targets();

struct Family {
  const char* name;
  std::span<const char* const> fields;  // of its row
  std::span<const char* const> states;  // torch's keys
};
std::span<const Family> families();

/// The shared object that the OpenMP runtime was loaded from.
const char* openmp_library();

/// A plan with its memory. Nothing below allocates once it is made.
class Engine {
 public:
  Engine(int family, const Target& target, std::vector<Layer> layers, std::vector<Item> items);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Throws std::invalid_argument with a layer's index where its counter holds no count of steps.
  void check_counters() const;

  /// One step. `rows` holds a row of hyper-parameters for each of the layers' options.
  void run(const void* const* gradients, const double* rows, int threads, double grad_scale,
           double max_grad_norm, bool skip_nonfinite);

  /// The step that must not happen (found_inf): only the reports say so.
  void skip();

  const std::vector<Layer> layers;
  std::vector<LayerReport> reports;
  Verdict verdict{};

 private:
  const Worker worker_;
  const std::vector<Item> items_;
  std::vector<Sums> slots_;
  std::vector<std::uint32_t> arrived_, published_;
  std::vector<std::int64_t> next_;
  std::int64_t scans_, elements_;
  Clock clock_{};
};

}  // namespace dk
