// What a step is made of: plain structs, filled from date_kernels/plan.py, read by every device.
#pragma once
#include <cstdint>

namespace dk {

constexpr int kMaxStates = 3;

/// Elements of one partial sum, by element index. It knows nothing of chunks or workers, so the sums do not
/// either.
constexpr std::int64_t kLeaf = 4096;

/// What an array holds. 16-bit values are computed with as float.
enum class Type : std::int32_t { float32, float64, bfloat16, float16 };
constexpr const char* kTypeNames[] = {"float32", "float64", "bfloat16", "float16"};

constexpr bool has_16_bits(Type type) { return type == Type::bfloat16 || type == Type::float16; }

enum class Kind : std::int32_t {
  plain,    // update alone: a layer without trust
  whole,    // measure and update in one visit
  measure,  // partial sums; where workers own their updates, who measured a chunk updates it
  scan,     // sum of squares of the gradient over all layers; stands before everything else
  update,   // the update of a measured chunk by whoever comes, on devices whose workers share a cache
};

/// Elements [begin, end) of a layer; begin is a multiple of kLeaf.
struct Item {
  std::int64_t begin, end;
  std::int32_t layer;
  Kind kind;
};

/// Sums of squares: of the weights, and of what the ratio's denominator is the norm of.
struct Sums {
  double weight, measured;
};

/// What the step found out about a layer.
struct LayerReport {
  double weight_norm, measured_norm, raw_ratio, ratio, clamp, skipped;
};
constexpr const char* kReportFields[] = {"weight_norm", "measured_norm", "raw_ratio",
                                         "ratio",       "clamp",         "skipped"};
static_assert(sizeof(LayerReport) == sizeof(double) * (sizeof(kReportFields) / sizeof(*kReportFields)));

/// One row of date_kernels/tables.py.
struct Layer {
  void* weights;  // of the arithmetic's type: the parameter or its master copy; null where a 16-bit
                  // parameter has none
  void* rounded;  // a 16-bit parameter, which takes the new weights' rounding; else null
  void* states[kMaxStates];  // null where the layer's options do not use that state
  float* step;               // null where the rule counts no steps
  std::int64_t size;
  std::int64_t slot;                 // first of its ceil(size / kLeaf) slots
  std::int64_t measures;             // MEASURE items of this layer
  std::int64_t options;              // its row of hyper-parameters: which options its param group gives it
  std::int64_t gradient_type, type;  // Types, of the gradient and of the parameter
  std::int64_t state_type;           // that of the arithmetic, or a 16-bit parameter's
};
static_assert(sizeof(Layer) == 13 * sizeof(std::int64_t));

/// One clip factor and one decision for the whole step, from the SCANs.
struct Verdict {
  double total_norm, clip, skip;
};

/// In memory that the workers themselves read and advance: a captured graph replays it correctly.
struct Clock {
  alignas(64) std::uint64_t ticket;
  alignas(64) std::uint32_t left;
  std::uint32_t scanned, judged, epoch;
};

/// What may lie in a tensor on the workers' device.
struct Number {
  const float* address;  // or null, and the value counts
  double value;
};

struct Plan {
  const Item* items;
  std::int64_t n_items, n_scans;
  const Layer* layers;
  std::int64_t first_layer, n_layers;  // of this launch
  const void* const* gradients;        // by layer
  const double* rows;                  // Rule::Row, as doubles
  Number grad_scale;                   // gradients are divided by it
  Number found_inf;                    // where it is not 0 nothing happens
  bool judged;                         // a launch before this one has scanned: its verdict stands
  Sums* slots;
  std::int64_t n_slots;
  std::uint32_t* arrived;    // per layer: MEASUREs done
  std::uint32_t* published;  // per layer: the epoch whose ratio stands in `reports`
  std::int64_t* next;        // per item: links a worker's chunks that wait for their ratio
  LayerReport* reports;
  Verdict* verdict;
  Clock* clock;
  double max_grad_norm;  // infinity: no clipping
  bool skip_nonfinite;
};

}  // namespace dk
