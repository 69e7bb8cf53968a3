// Device = an OS thread. Its register file is the cache: update() reads again what measure() has read.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>
#include <type_traits>
#include <utility>

#include "../engine.h"
#include "../rules/rule.h"

namespace dk::DK_ARCH {

/// Sums of squares of one leaf, in kLanes virtual lanes (lane = index mod kLanes) and then a fixed tree: the
/// same bits on every instruction set. The square of a float is exact in double, so contracting it would
/// change nothing, and it cannot overflow.
class Lanes {
 public:
  static constexpr int kLanes = 16;

  /// Elements to prefetch ahead: two streams keep the hardware's own prefetcher short of requests (11.9 GB/s
  /// from memory without, 15.8 with, where reading alone gives 16.6; one core).
  static constexpr int kAhead = 512;

  /// f(i) -> the two values of element i, which it reads from `streams`.
  template <class F, class... T>
  DK_INLINE static Sums of_squares(std::int64_t n, F f, const T*... streams) {
    alignas(64) double a[kLanes] = {}, b[kLanes] = {};
    const auto add = [&](std::int64_t i, int lane) __attribute__((always_inline)) {
      const Sums x = f(i + lane);
      a[lane] += x.weight * x.weight;
      b[lane] += x.measured * x.measured;
    };
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      (..., __builtin_prefetch(streams + i + kAhead));
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) add(i, lane);
    }
    for (int lane = 0; i + lane < n; ++lane) add(i, lane);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        a[lane] += a[lane + half];
        b[lane] += b[lane + half];
      }
    }
    return {a[0], b[0]};
  }
};

/// Elements [begin, end) of one layer under one rule.
template <class Rule>
class ThreadChunk {
  using T = typename Rule::Value;
  static constexpr int kStates = Rule::kStates;

 public:
  const Rule rule;

  ThreadChunk(const Layer& layer, const Rule& rule, std::int64_t begin, std::int64_t end)
      : rule(rule), layer_(layer), begin_(begin), end_(end) {}

  void measure(Sums* slots) const {
    leaves(slots, [r = rule](std::int64_t n, const T* w, const T* g) {
      const auto values = [=](std::int64_t i) { return Sums{w[i], r.measured(w[i], g[i])}; };
      return Lanes::of_squares(n, values, w, g);
    });
  }

  void scan(Sums* slots) const {
    leaves(slots, [r = rule](std::int64_t n, const T*, const T* g) {
      const auto values = [=](std::int64_t i) { return Sums{0, r.scale * g[i]}; };
      return Lanes::of_squares(n, values, g);
    });
  }

  void update(Scale<T> scale) const {
    each_variant(std::make_integer_sequence<int, Rule::kVariants>(), scale);
  }

 private:
  template <class F>
  DK_INLINE void leaves(Sums* slots, F sum) const {
    const T* const w = static_cast<const T*>(layer_.weights);
    const T* const g = static_cast<const T*>(layer_.gradient);
    for (std::int64_t at = begin_; at < end_; at += kLeaf) {
      *slots++ = sum(std::min(kLeaf, end_ - at), w + at, g + at);
    }
  }

  template <int... V>
  void each_variant(std::integer_sequence<int, V...>, Scale<T> scale) const {
    (void)((rule.variant == V && (loop<V>(scale, std::make_integer_sequence<int, kStates>()), true)) || ...);
  }

  template <int V, int... K>
  void loop(Scale<T> scale, std::integer_sequence<int, K...>) const {
    T* __restrict const w = static_cast<T*>(layer_.weights) + begin_;
    const T* __restrict const g = static_cast<const T*>(layer_.gradient) + begin_;
    T* const s[kStates] = {state<V>(K)...};
    const Rule r = rule;  // a copy that no store can alias
    const std::int64_t n = end_ - begin_;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      T t[kStates] = {(Rule::kUses[V][K] ? s[K][i] : T(0))...};
      const T u = r.template direction<V>(w[i], g[i], t, scale.in);
      (..., (Rule::kUses[V][K] ? void(s[K][i] = t[K]) : void()));
      w[i] -= scale.out * u;
    }
  }

  template <int V>
  T* state(int k) const {
    return Rule::kUses[V][k] ? static_cast<T*>(layer_.states[k]) + begin_ : nullptr;
  }

  const Layer& layer_;
  const std::int64_t begin_, end_;
};

class Thread {
 public:
  using Order = std::memory_order;
  template <class T>
  using Atomic = std::atomic_ref<T>;
  template <class Rule>
  using Chunk = ThreadChunk<Rule>;

  explicit Thread(int workers) : workers_(workers) {}

  int workers() const { return workers_; }

  template <class F>
  auto agree(F f) {  // one lane: it agrees with itself
    return f();
  }
  template <class F>
  void once(F f) {
    f();
  }

  void pause() {
    if (++pauses_ % 1024 == 0) {
      std::this_thread::yield();  // more workers than cores: let the one we wait for run
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Sums add_up(const Sums* slots, std::int64_t n) const {
    Sums total{};
    for (std::int64_t i = 0; i < n; ++i) {
      total.weight += slots[i].weight;
      total.measured += slots[i].measured;
    }
    return total;
  }

 private:
  int workers_;
  unsigned pauses_ = 0;
};

}  // namespace dk::DK_ARCH
