// The engine's protocol under ThreadSanitizer: the same text as on every device, with random delays wherever
// workers meet, for workers that own their updates, as a CPU's, and for such that share them, as a GPU's.
//
//   race sound             1 to 32 workers; prints a digest for each number of workers and chunk size
//   race ORDER own|shared  the same with that memory order, or "every" one, relaxed: must be reported
//   race random FIRST N    N random plans from seed FIRST on, by random numbers of workers: one result each
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/thread.h"
#include "rules/all.h"

using namespace dk;
using namespace dk::DK_ARCH;

namespace {

template <std::memory_order Acquire, std::memory_order Release, std::memory_order AcqRel>
struct Orders {
  static constexpr auto relaxed = std::memory_order_relaxed, acquire = Acquire, release = Release,
                        acq_rel = AcqRel;
};
constexpr auto kRelaxed = std::memory_order_relaxed, kAcquire = std::memory_order_acquire,
               kRelease = std::memory_order_release, kAcqRel = std::memory_order_acq_rel;
using Sound = Orders<kAcquire, kRelease, kAcqRel>;

template <class Order_, bool Owns>
class Delayed : public Thread {
 public:
  using Order = Order_;
  static constexpr bool kOwnsUpdates = Owns;

  Delayed(int workers, int seed) : Thread(workers), random_(seed) {}

  template <class F>
  auto agree(F f) {
    delay();
    const auto result = f();
    delay();
    return result;
  }
  template <class F>
  void once(F f) {
    delay();
    f();
    delay();
  }
  void pause() { std::this_thread::sleep_for(std::chrono::microseconds(10)); }

 private:
  void delay() {
    const auto draw = random_() % 16;
    if (draw == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 100));
    if (draw < 4) std::this_thread::yield();
  }

  std::minstd_rand random_;
};

/// Layers, and how they are cut.
struct Case {
  std::vector<std::int64_t> sizes = {7, 1, 13'000, 0, 4096, 4097, 20'480, 9408, 30'001, 64};
  int plain = 5;          // the layer without trust
  int skipped_layer = 7;  // its weights are not finite: with SCANs it alone stays as it is
  std::int64_t chunk = kLeaf;
  bool scan = false;
  int lag = 1;  // layers measured between a layer's last MEASURE and its first UPDATE
};

constexpr int kArrays = 2 + kMaxStates;  // weights, gradient, states
constexpr int kSteps = 6;
constexpr std::uint32_t kFirstEpoch = 0xfffffffd;  // the steps pass 2^32
constexpr int kSkippedStep = 3;                    // a gradient is not finite: nothing happens
constexpr int kFoundStep = 4;                      // found_inf says so: nothing happens
constexpr auto kInfinity = std::numeric_limits<float>::infinity();

/// RMSprop with all of its states, under one row of numbers: a plan and its memory.
class Steps {
 public:
  Steps(const Case& of, bool owns)
      : sizes_(of.sizes),
        n_(static_cast<int>(of.sizes.size())),
        layers_(n_),
        memory_(n_),
        gradients_(n_),
        counters_(n_),
        arrived_(n_),
        published_(n_),
        reports_(n_) {
    std::minstd_rand random(1);
    std::int64_t slots = 0;
    for (int i = 0; i < n_; ++i) {
      for (auto& array : memory_[i]) {
        for (std::int64_t k = 0; k < sizes_[i]; ++k) array.push_back((random() % 2001) / 1000.f - 1);
      }
      for (float& v : memory_[i][2]) v = 1 + v * v;  // square_avg
      Layer& layer = layers_[i];
      layer = {.weights = memory_[i][0].data(),
               .rounded = nullptr,
               .states = {},
               .step = &counters_[i],
               .size = sizes_[i],
               .slot = slots,
               .measures = 0,
               .options = 0,
               .gradient_type = 0,
               .type = 0,
               .state_type = 0};
      gradients_[i] = memory_[i][1].data();
      for (int k = 0; k < kMaxStates; ++k) layer.states[k] = memory_[i][2 + k].data();
      slots += (sizes_[i] + kLeaf - 1) / kLeaf;
    }
    auto& spoiled = memory_[of.skipped_layer][0];
    if (!spoiled.empty()) spoiled.back() = kInfinity;
    row_.of_update = of.scan ? 0 : 1;  // without SCANs nothing is skipped, and states are committed early
    if (of.scan) {
      for (int i = 0; i < n_; ++i) cut(i, Kind::scan, of.chunk);
      scans_ = static_cast<std::int64_t>(items_.size());
    }
    for (int i = 0; i < n_ + of.lag; ++i) {
      const int late = i - of.lag;
      if (!owns && late >= 0 && layers_[late].measures > 0) cut(late, Kind::update, of.chunk);
      if (i >= n_) continue;
      const bool whole = sizes_[i] <= of.chunk;
      cut(i, i == of.plain ? Kind::plain : whole ? Kind::whole : Kind::measure, of.chunk);
    }
    slots_.resize(slots);
    next_.resize(items_.size());
  }

  template <class Order, bool Owns>
  void take(int workers) {
    const Plan plan{.items = items_.data(),
                    .n_items = static_cast<std::int64_t>(items_.size()),
                    .n_scans = scans_,
                    .layers = layers_.data(),
                    .first_layer = 0,
                    .n_layers = n_,
                    .gradients = gradients_.data(),
                    .rows = &row_.lr,
                    .grad_scale = {nullptr, 1},
                    .found_inf = {&found_, 0},
                    .judged = false,
                    .slots = slots_.data(),
                    .n_slots = static_cast<std::int64_t>(slots_.size()),
                    .arrived = arrived_.data(),
                    .published = published_.data(),
                    .next = next_.data(),
                    .reports = reports_.data(),
                    .verdict = &verdict_,
                    .clock = &clock_,
                    .max_grad_norm = 10,
                    .skip_nonfinite = scans_ != 0};
    for (int step = 0; step < kSteps; ++step) {
      float& last = memory_[0][1].back();  // the first layer is not empty
      const float kept = last;
      if (step == kSkippedStep && scans_ != 0) last = kInfinity;
      found_ = step == kFoundStep ? 1 : 0;
      std::vector<std::thread> threads;
      for (int i = 0; i < workers; ++i) {
        threads.emplace_back([&, i] {
          Delayed<Order, Owns> worker(workers, 100 * step + i + 1);
          run_worker<Delayed<Order, Owns>, Rmsprop>(worker, plan);
        });
      }
      for (std::thread& thread : threads) thread.join();
      last = kept;
      expect_reset(step);
      note(reports_.data(), reports_.size() * sizeof(LayerReport));
      note(&verdict_, sizeof verdict_);
      note(counters_.data(), counters_.size() * sizeof(float));
      for (const auto& arrays : memory_) {
        for (const auto& array : arrays) note(array.data(), array.size() * sizeof(float));
      }
    }
  }

  std::uint64_t digest() const { return digest_; }

 private:
  /// The next step finds everything as this one did, but for the epoch.
  void expect_reset(int step) const {
    const auto waiting = std::count(arrived_.begin(), arrived_.end(), 0u);
    const auto epoch = kFirstEpoch + static_cast<std::uint32_t>(step) + 1;
    if (clock_.ticket == 0 && clock_.left == 0 && clock_.scanned == 0 && waiting == n_ &&
        clock_.epoch == epoch) {
      return;
    }
    std::fprintf(stderr, "step %d did not reset the clock\n", step);
    std::exit(1);
  }

  void cut(int layer, Kind kind, std::int64_t chunk) {
    std::int64_t begin = 0;
    do {
      items_.push_back({begin, std::min(sizes_[layer], begin + chunk), layer, kind});
      layers_[layer].measures += kind == Kind::measure;
    } while ((begin += chunk) < sizes_[layer]);
  }

  void note(const void* data, std::size_t bytes) {  // FNV-1a, four bytes at a time
    for (std::size_t at = 0; at < bytes; at += 4) {
      std::uint32_t word;
      std::memcpy(&word, static_cast<const char*>(data) + at, 4);
      digest_ = (digest_ ^ word) * 1099511628211u;
    }
  }

  RmspropRow row_{{.lr = 0.01,
                   .lr_address = 0,
                   .lr_double = 0,
                   .lr_decay = 0,
                   .lr_inside = 0,
                   .ratio_inside = 0,
                   .sign = 1,
                   .gradient_decay = 0.01,
                   .update_decay = 0,
                   .weights_decay = 0,
                   .of_update = 0,
                   .measured_decay = 0,
                   .coefficient = 1,
                   .lower = 0.01,
                   .upper = 10,
                   .trust_eps = 0,
                   .zero_norm = 1,
                   .added_decay = 0.01,
                   .weight_norm_lower = 0,
                   .weight_norm_upper = 100,
                   .clip_by_lr = 0,
                   .moving = 0,
                   .final = 0,
                   .gamma = 0},
                  0.9,
                  0.1,
                  0,
                  1e-8,
                  0.9,
                  1};
  const std::vector<std::int64_t> sizes_;
  const int n_;
  std::vector<Layer> layers_;
  std::vector<std::array<std::vector<float>, kArrays>> memory_;
  std::vector<Item> items_;
  std::vector<Sums> slots_;
  std::vector<std::int64_t> next_;
  std::int64_t scans_ = 0;
  std::vector<const void*> gradients_;
  std::vector<float> counters_;
  float found_ = 0;
  std::vector<std::uint32_t> arrived_, published_;
  std::vector<LayerReport> reports_;
  Verdict verdict_{};
  Clock clock_{.ticket = 0, .left = 0, .scanned = 0, .judged = 0, .epoch = kFirstEpoch};
  std::uint64_t digest_ = 14695981039346656037u;
};

/// Prints a digest for each case: it may depend on whether there are SCANs, on nothing else.
template <class Order, bool Owns>
void run(int workers) {
  for (const std::int64_t chunk : {kLeaf, 4 * kLeaf}) {
    for (const bool scan : {false, true}) {
      Steps steps({.chunk = chunk, .scan = scan}, Owns);
      steps.take<Order, Owns>(workers);
      std::printf("%d workers, %s updates, chunk %d, %s: %016llx\n", workers, Owns ? "own" : "shared",
                  static_cast<int>(chunk), scan ? "scanned" : "not scanned",
                  static_cast<unsigned long long>(steps.digest()));
    }
  }
}

template <class Order>
void run(int workers, bool owns) {
  owns ? run<Order, true>(workers) : run<Order, false>(workers);
}

template <bool Owns>
std::uint64_t digest(const Case& of, int workers) {
  Steps steps(of, Owns);
  steps.take<Sound, Owns>(workers);
  return steps.digest();
}

/// Any plan is taken alike by one worker that owns its updates and by any that share them.
void run_random(unsigned seed) {
  std::minstd_rand random(seed + 1);
  const auto draw = [&](int n) { return static_cast<int>(random() / 7 % static_cast<unsigned>(n)); };
  Case of;
  of.sizes = {1 + draw(9000)};
  for (int n = draw(8); n > 0; --n) of.sizes.push_back(draw(4) == 0 ? draw(3) : draw(5) * kLeaf + draw(40));
  const auto n = static_cast<int>(of.sizes.size());
  of.plain = draw(n + 2);
  of.skipped_layer = draw(n);
  of.chunk = kLeaf << draw(3);
  of.scan = draw(2) == 0;
  of.lag = 1 + draw(4);
  const int most[] = {1, 2, 3, 5, 8, 32};
  const int workers = most[draw(6)];
  const std::uint64_t expected = digest<true>(of, 1);
  if (digest<true>(of, workers) == expected && digest<false>(of, workers) == expected) return;
  std::fprintf(stderr, "seed %u: %d workers differ from one\n", seed, workers);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string order = argc >= 2 ? argv[1] : "";
  if (order == "random" && argc == 4) {
    const unsigned first = std::atoi(argv[2]), n = std::atoi(argv[3]);
    for (unsigned seed = first; seed < first + n; ++seed) run_random(seed);
    std::printf("%u plans\n", n);
    return 0;
  }
  if (order == "sound") {
    for (const int workers : {1, 2, 3, 8, 32}) {
      for (const bool owns : {true, false}) run<Sound>(workers, owns);
    }
  } else if (argc != 3) {
    return 2;
  } else if (const bool owns = std::strcmp(argv[2], "own") == 0; order == "acquire") {
    run<Orders<kRelaxed, kRelease, kAcqRel>>(8, owns);
  } else if (order == "release") {
    run<Orders<kAcquire, kRelaxed, kAcqRel>>(8, owns);
  } else if (order == "acq_rel") {
    run<Orders<kAcquire, kRelease, kRelaxed>>(8, owns);
  } else if (order == "every") {
    run<Orders<kRelaxed, kRelaxed, kRelaxed>>(8, owns);
  } else {
    return 2;
  }
}
