// The host's side of a step: the workspace of a plan, the rows its layers need, and the launch.
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

/// One layer's options at one step share a row of hyper-parameters.
struct RowKey {
  std::int32_t options;
  std::int64_t step;
  bool operator==(const RowKey&) const = default;
};

/// A plan with its memory. Nothing below allocates once it is made.
class Engine {
 public:
  Engine(int family, const Target& target, std::vector<Layer> layers, std::vector<Item> items);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Gives each layer its row from its options and its step counter; returns the distinct rows in order.
  /// Throws std::invalid_argument with the layer's index where the counter holds no count of steps.
  std::span<const RowKey> assign_rows();

  /// One step. `rows` and `trust` stand in the order of assign_rows().
  void run(const double* rows, const TrustRow* trust, int threads, double max_grad_norm, bool skip_nonfinite);

  /// The step that must not happen (found_inf): only the reports say so.
  void skip();

  std::vector<Layer> layers;
  std::vector<LayerReport> reports;
  Verdict verdict{};

 private:
  void conclude();

  const Worker worker_;
  const std::vector<Item> items_;
  std::vector<RowKey> row_keys_;
  std::vector<Sums> slots_;
  std::vector<std::uint32_t> arrived_, published_;
  std::vector<std::int64_t> next_;
  std::int64_t scans_, elements_;
  Clock clock_{};
};

}  // namespace dk
