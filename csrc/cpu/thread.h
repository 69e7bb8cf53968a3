// Device = an OS thread. Its register file is the cache: update() reads again what measure() has read.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>
#include <type_traits>
#include <utility>

#include "../convert.h"
#include "../engine.h"
#include "../rules/rule.h"

namespace dk::DK_ARCH {

/// Elements to prefetch ahead: a few streams keep the hardware's own prefetcher short of requests (two that
/// are read: 11.9 GB/s from memory without, 15.8 with, where reading alone gives 16.6; one core).
constexpr int kAhead = 512;

/// Sums of squares of one leaf, in kLanes virtual lanes (lane = index mod kLanes) and then a fixed tree: the
/// same bits on every instruction set. The square of a float is exact in double, so contracting it would
/// change nothing, and it cannot overflow.
class Lanes {
 public:
  static constexpr int kLanes = 16;

  /// Adds the next n elements, in groups that start at a multiple of kLanes: f(i) -> the two values of
  /// element i, which it reads from `streams`.
  template <class F, class... T>
  DK_INLINE void add(std::int64_t n, F f, const T*... streams) {
    alignas(64) double a[kLanes], b[kLanes];
    std::copy(a_, a_ + kLanes, a);
    std::copy(b_, b_ + kLanes, b);
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
    std::copy(a, a + kLanes, a_);
    std::copy(b, b + kLanes, b_);
  }

  DK_INLINE Sums total() {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        a_[lane] += a_[lane + half];
        b_[lane] += b_[lane + half];
      }
    }
    return {a_[0], b_[0]};
  }

 private:
  alignas(64) double a_[kLanes] = {}, b_[kLanes] = {};
};

/// Elements that pass through a buffer at once: weights, gradient and states of a block fit the first-level
/// cache together. A multiple of kLanes that divides a leaf.
constexpr std::int64_t kBlock = 1024;
static_assert(kBlock % Lanes::kLanes == 0 && kLeaf % kBlock == 0);

constexpr int kLine = 64;  // bytes
constexpr int kStrip = 64;

/// Elements [begin, end) of one layer under one rule, in its arithmetic.
template <class Rule>
class ThreadChunk {
  using T = typename Rule::Value;
  static constexpr int kStates = Rule::kStates;
  static constexpr Type kType = std::is_same_v<T, double> ? Type::float64 : Type::float32;

  struct Array {
    const void* data;
    Type type;
  };

  /// Values on their way: a block of 16-bit ones as float, or of an update to be measured.
  struct Buffer {
    alignas(64) T values[kBlock];
  };

 public:
  const Rule rule;

  ThreadChunk(const Layer& layer, const void* gradient, const Rule& rule, const Item& item)
      : rule(rule),
        layer_(layer),
        weights_{layer.weights, kType},
        gradient_{gradient, static_cast<Type>(layer.gradient_type)},
        states_type_(static_cast<Type>(layer.state_type)),
        begin_(item.begin),
        end_(item.end) {
    if (layer.weights == nullptr) weights_ = {layer.rounded, static_cast<Type>(layer.type)};
  }

  /// `early`: Note [Early commit].
  void measure(Sums* slots, bool early) const {
    if (rule.of_update) {
      with_variant(rule, [&](auto v) { measure_updates<v>(slots, early); });
      return;
    }
    leaves(slots, true, [r = rule](Lanes& lanes, std::int64_t n, const T* w, const T* g) {
      lanes.add(n, [=](std::int64_t i) { return Sums{w[i], r.measured(w[i], g[i])}; }, w, g);
    });
  }

  void scan(Sums* slots) const {
    leaves(slots, false, [r = rule](Lanes& lanes, std::int64_t n, const T*, const T* g) {
      lanes.add(n, [=](std::int64_t i) { return Sums{0, r.scale * g[i]}; }, g);
    });
  }

  /// `committed`: the layer was measured, and early commit was allowed.
  void update(Scale<T> scale, bool committed) const {
    with_variant(rule, [&](auto v) {
      if constexpr (Rule::kConcludes[v]) {
        if (committed && rule.of_update) return conclude<v>(scale);
      }
      step<v>(scale);
    });
  }

 private:
  /// f(lanes, n, w, g) adds n elements to a leaf's lanes; `weights`: whether it looks at them.
  template <class F>
  void leaves(Sums* slots, bool weights, F f) const {
    const bool direct = gradient_.type == kType && (!weights || weights_.type == kType);
    const std::int64_t size = direct ? kLeaf : kBlock;
    Buffer w, g;
    for (std::int64_t at = begin_; at < end_;) {
      Lanes lanes;
      for (const std::int64_t end = std::min(at + kLeaf, end_); at < end; at += size) {
        const std::int64_t n = std::min(size, end - at);
        f(lanes, n, weights ? read(weights_, at, n, w) : nullptr, read(gradient_, at, n, g));
      }
      *slots++ = lanes.total();
    }
  }

  template <int V>
  void measure_updates(Sums* slots, bool early) const {
    Buffer w_buffer, g_buffer, u;
    for (std::int64_t at = begin_; at < end_;) {
      Lanes lanes;
      for (const std::int64_t end = std::min(at + kLeaf, end_); at < end; at += kBlock) {
        const std::int64_t n = std::min(kBlock, end - at);
        const T* const w = read(weights_, at, n, w_buffer);
        const T* const g = read(gradient_, at, n, g_buffer);
        if (early && Rule::kConcludes[V]) {
          preview<V, true>(at, n, w, g, u.values);
        } else {
          preview<V, false>(at, n, w, g, u.values);
        }
        lanes.add(n, [=, u = u.values](std::int64_t i) { return Sums{w[i], u[i]}; });
      }
      *slots++ = lanes.total();
    }
  }

  template <int V>
  void step(Scale<T> scale) const {
    Buffer w_buffer, g_buffer;
    blocks([&](std::int64_t at, std::int64_t n) {
      T* const w = writable(weights_, at, n, w_buffer);
      advance<V>(at, n, w, read(gradient_, at, n, g_buffer), scale);
      if (layer_.rounded != nullptr) round(w, layer_.rounded, static_cast<Type>(layer_.type), at, n);
    });
  }

  template <int V>
  void conclude(Scale<T> scale) const {
    Buffer w_buffer;
    blocks([&](std::int64_t at, std::int64_t n) {
      T* const w = writable(weights_, at, n, w_buffer);
      conclude<V>(at, n, w, scale);
      if (layer_.rounded != nullptr) round(w, layer_.rounded, static_cast<Type>(layer_.type), at, n);
    });
  }

  /// The states that a variant uses.
  template <int V>
  struct States {
    T* __restrict arrays[kStates];

    DK_INLINE void prefetch(std::int64_t i) const {
      for (int k = 0; k < kStates; ++k) {
        if (Rule::kUses[V][k]) __builtin_prefetch(arrays[k] + i);
      }
    }
    DK_INLINE void load(std::int64_t i, T (&t)[kStates]) const {
      for (int k = 0; k < kStates; ++k) t[k] = Rule::kUses[V][k] ? arrays[k][i] : T(0);
    }
    DK_INLINE void store(std::int64_t i, const T (&t)[kStates]) const {
      for (int k = 0; k < kStates; ++k) {
        if (Rule::kUses[V][k]) arrays[k][i] = t[k];
      }
    }
  };

  /// f(0), ..., f(n - 1), while lines that they will ask for in `streams` and states are on their way.
  template <int V, class F, class... S>
  DK_INLINE static void each(std::int64_t n, const States<V>& s, F f, const S*... streams) {
    std::int64_t i = 0;
    for (; i + kStrip <= n; i += kStrip) {
      for (std::int64_t ahead = i + kAhead; ahead < i + kAhead + kStrip; ahead += kLine / sizeof(T)) {
        (..., __builtin_prefetch(streams + ahead));
        s.prefetch(ahead);
      }
#pragma omp simd
      for (int k = 0; k < kStrip; ++k) f(i + k);
    }
#pragma omp simd
    for (std::int64_t k = i; k < n; ++k) f(k);
  }

  // --- the loops: one for each way that a variant's direction is used

  /// Advances the states and the weights.
  template <int V>
  void advance(std::int64_t at, std::int64_t n, T* __restrict w, const T* __restrict g,
               Scale<T> scale) const {
    const Rule r = rule;  // a copy that no store can alias
    Buffer buffers[kStates];
    const States<V> s = states<V>(at, n, buffers);
    const auto one = [&](std::int64_t i) __attribute__((always_inline)) {
      T t[kStates];
      s.load(i, t);
      const T u = r.update(w[i], r.template direction<V>(w[i], g[i], t, scale.in), scale.in);
      s.store(i, t);
      w[i] = r.applied(w[i], u, scale.out);
    };
    each(n, s, one, w, g);
    for (int k = 0; k < kStates; ++k) {
      if (Rule::kUses[V][k]) round(s.arrays[k], layer_.states[k], states_type_, at, n);
    }
  }

  /// The update before its ratio is known, and with Commit the states that it leaves.
  template <int V, bool Commit>
  void preview(std::int64_t at, std::int64_t n, const T* __restrict w, const T* __restrict g,
               T* __restrict u) const {
    const Rule r = rule;
    Buffer buffers[kStates];
    const States<V> s = states<V>(at, n, buffers);
    const auto one = [&](std::int64_t i) __attribute__((always_inline)) {
      T t[kStates];
      s.load(i, t);
      u[i] = r.update(w[i], r.template direction<V>(w[i], g[i], t, T(1)), T(1));
      if constexpr (Commit) s.store(i, t);
    };
    each(n, s, one, w, g);
  }

  /// Advances the weights by states that were committed.
  template <int V>
  void conclude(std::int64_t at, std::int64_t n, T* __restrict w, Scale<T> scale) const {
    const Rule r = rule;
    Buffer buffers[kStates];
    const States<V> s = states<V>(at, n, buffers);
    const auto one = [&](std::int64_t i) __attribute__((always_inline)) {
      T t[kStates];
      s.load(i, t);
      w[i] = r.applied(w[i], r.update(w[i], r.template conclude<V>(t), scale.in), scale.out);
    };
    each(n, s, one, w);
  }

  // --- memory

  /// n elements of each state that a variant uses: its own memory, or converted into a buffer.
  template <int V>
  States<V> states(std::int64_t at, std::int64_t n, Buffer (&buffers)[kStates]) const {
    States<V> s{};
    for (int k = 0; k < kStates; ++k) {
      if (Rule::kUses[V][k]) s.arrays[k] = writable({layer_.states[k], states_type_}, at, n, buffers[k]);
    }
    return s;
  }

  /// f(at, n) for the parts of the chunk: itself, or blocks of what must pass through a buffer.
  template <class F>
  void blocks(F f) const {
    const bool direct = weights_.type == kType && gradient_.type == kType && layer_.rounded == nullptr &&
                        states_type_ == kType;
    const std::int64_t size = direct ? end_ - begin_ : kBlock;
    for (std::int64_t at = begin_; at < end_; at += size) f(at, std::min(size, end_ - at));
  }

  /// n elements in the arithmetic's type: the array's own memory, or converted into the buffer.
  const T* read(const Array& array, std::int64_t at, std::int64_t n, Buffer& buffer) const {
    if constexpr (std::is_same_v<T, float>) {
      const auto* const bits = static_cast<const std::uint16_t*>(array.data) + at;
      if (array.type == Type::bfloat16) return widen<Bfloat16>(bits, buffer.values, n), buffer.values;
      if (array.type == Type::float16) return widen<Float16>(bits, buffer.values, n), buffer.values;
    }
    return static_cast<const T*>(array.data) + at;
  }

  T* writable(const Array& array, std::int64_t at, std::int64_t n, Buffer& buffer) const {
    return const_cast<T*>(read(array, at, n, buffer));
  }

  /// Gives an array of 16 bits its new values.
  void round(const T* values, void* array, Type type, std::int64_t at, std::int64_t n) const {
    if constexpr (std::is_same_v<T, float>) {
      auto* const bits = static_cast<std::uint16_t*>(array) + at;
      if (type == Type::bfloat16) narrow<Bfloat16>(values, bits, n);
      if (type == Type::float16) narrow<Float16>(values, bits, n);
    }
  }

  const Layer& layer_;
  Array weights_, gradient_;
  const Type states_type_;
  const std::int64_t begin_, end_;
};

class Thread {
 public:
  using Order = std::memory_order;
  template <class T>
  using Atomic = std::atomic_ref<T>;
  static constexpr bool kOwnsUpdates = true;

  explicit Thread(int workers) : workers_(workers) {}

  int workers() const { return workers_; }

  /// f(chunk) in the arithmetic of the layer.
  template <template <class> class Rule, class Row, class F>
  void visit(const Layer& layer, const void* gradient, const Row& row, const Moment& now, const Item& item,
             F f) const {
    const auto in = [&]<class T>(std::type_identity<T>) {
      const ThreadChunk<Rule<T>> chunk(layer, gradient, Rule<T>(row, now), item);
      f(chunk);
    };
    static_cast<Type>(layer.type) == Type::float64 ? in(std::type_identity<double>())
                                                   : in(std::type_identity<float>());
  }

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

  /// f(0), ..., f(n - 1), by whichever lanes.
  template <class F>
  void each(std::int64_t n, F f) {
    for (std::int64_t i = 0; i < n; ++i) f(i);
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
