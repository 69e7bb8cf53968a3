// Device = a thread block. Its registers hold one tile: a WHOLE item that is no larger is read once.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../convert.h"
#include "../engine.h"
#include "../rules/rule.h"
#include "kernels.h"
#include "vendor.cuh"

namespace dk::DK_ARCH {

constexpr int kThreads = cuda::kThreads;

/// How an array's elements lie in memory, by what it holds.
template <class Held>
struct Format {
  using Bits = Held;
  static __device__ Bits widen(Bits x) { return x; }
  static __device__ Bits narrow(Bits x) { return x; }
};
template <class Held>
struct Format16 {
  using Bits = std::uint16_t;
  static __device__ float widen(Bits x) { return Held::widen(x); }
  static __device__ Bits narrow(float x) { return Held::narrow(x); }
};
template <>
struct Format<Bfloat16> : Format16<Bfloat16> {};
template <>
struct Format<Float16> : Format16<Float16> {};

/// A tile: each thread has `kGroup` neighbours, and then those of the other threads' groups come first.
template <class T, int kElements, int kGroup>
struct Tile {
  static constexpr int kSize = kThreads * kElements;

  /// The first element of a thread's group.
  static __device__ int first(int group) {
    return (group * kThreads + static_cast<int>(threadIdx.x)) * kGroup;
  }

  /// Elements [at, at + n) of an array; those behind n are 0.
  template <class Held, Hint hint>
  static __device__ void get(T (&x)[kElements], const void* array, std::int64_t at, int n, bool aligned) {
    using F = Format<Held>;
    using Bits = typename F::Bits;
    constexpr int kLoads = kGroup * sizeof(Bits) / sizeof(uint4);
    const Bits* const from = static_cast<const Bits*>(array) + at;
#pragma unroll
    for (int v = 0; v < kElements / kGroup; ++v) {
      union {
        uint4 words[kLoads];
        Bits bits[kGroup];
      } group;
      if (aligned && n == kSize) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          group.words[k] = load16<hint>(reinterpret_cast<const uint4*>(from + first(v)) + k);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) group.bits[j] = first(v) + j < n ? from[first(v) + j] : Bits(0);
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) x[v * kGroup + j] = F::widen(group.bits[j]);
    }
  }

  template <class Held, Hint hint>
  static __device__ void put(const T (&x)[kElements], void* array, std::int64_t at, int n, bool aligned) {
    using F = Format<Held>;
    using Bits = typename F::Bits;
    constexpr int kStores = kGroup * sizeof(Bits) / sizeof(uint4);
    Bits* const to = static_cast<Bits*>(array) + at;
#pragma unroll
    for (int v = 0; v < kElements / kGroup; ++v) {
      union {
        uint4 words[kStores];
        Bits bits[kGroup];
      } group;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) group.bits[j] = F::narrow(x[v * kGroup + j]);
      if (aligned && n == kSize) {
#pragma unroll
        for (int k = 0; k < kStores; ++k) {
          store16<hint>(reinterpret_cast<uint4*>(to + first(v)) + k, group.words[k]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (first(v) + j < n) to[first(v) + j] = group.bits[j];
        }
      }
    }
  }

  /// f(i) for each of this thread's elements i that lie before n.
  template <class F>
  static __device__ void each(int n, F f) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (n == kSize || first(i / kGroup) + i % kGroup < n) f(i);
    }
  }
};

/// What a block's threads say to each other.
union Shared {
  std::uint64_t word;
  Sums parts[kThreads / 32];
};

/// Elements [begin, end) of a layer whose parameter holds `W` and whose gradient `G`.
template <class Block, class Rule, class W, class G>
class BlockChunk {
  using T = typename Rule::Value;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kSmallest =
      std::min(sizeof(typename Format<W>::Bits), sizeof(typename Format<G>::Bits));
  // What the registers of two blocks a multiprocessor hold; quotients and conversions need some, too.
  static constexpr int kElements = sizeof(T) == 8                     ? (kStates > 2 ? 2 : 4)
                                   : Rule::kDivides || kSmallest == 2 ? 8
                                                                      : kMost;
  using Tile = DK_ARCH::Tile<T, kElements, 16 / kSmallest>;
  static_assert(kLeaf % Tile::kSize == 0);

 public:
  const Rule rule;

  __device__ BlockChunk(Block& block, const Layer& layer, const void* gradient, const Rule& rule,
                        const Item& item)
      : rule(rule), block_(block), layer_(layer), gradient_(gradient), begin_(item.begin), end_(item.end) {
    auto bits = reinterpret_cast<std::uintptr_t>(layer.weights) |
                reinterpret_cast<std::uintptr_t>(layer.rounded) | reinterpret_cast<std::uintptr_t>(gradient);
    for (const void* state : layer.states) bits |= reinterpret_cast<std::uintptr_t>(state);
    aligned_ = bits % sizeof(uint4) == 0;
  }

  __device__ void scan(Sums* slots) {
    leaves(slots, [&](Sums& sum, std::int64_t at, int n) {
      Tile::template get<G, Hint::keep>(g_, gradient_, at, n, aligned_);
      Tile::each(n, [&](int i) { add(sum, 0, rule.scale * g_[i]); });
    });
  }

  /// `early`: Note [Early commit].
  __device__ void measure(Sums* slots, bool early) {
    kept_ = end_ - begin_ <= Tile::kSize;
    if (!rule.of_update) {
      leaves(slots, [&](Sums& sum, std::int64_t at, int n) {
        get_weights<Hint::keep>(at, n);
        Tile::template get<G, Hint::keep>(g_, gradient_, at, n, aligned_);
        Tile::each(n, [&](int i) { add(sum, w_[i], rule.measured(w_[i], g_[i])); });
      });
      stateless_ = true;
      return;
    }
    with_variant(rule, [&](auto variant) {
      constexpr int V = variant;
      const bool commits = early && Rule::kConcludes[V];
      leaves(slots, [&](Sums& sum, std::int64_t at, int n) {
        get_weights<Hint::keep>(at, n);
        Tile::template get<G, Hint::keep>(g_, gradient_, at, n, aligned_);
        get_states<V, Hint::keep>(at, n);
        Tile::each(n, [&](int i) {
          T s[kStates];
          for (int k = 0; k < kStates; ++k) s[k] = s_[k][i];
          const T u = rule.update(w_[i], rule.template direction<V>(w_[i], g_[i], s, T(1)), T(1));
          add(sum, w_[i], u);
          for (int k = 0; k < kStates; ++k) s_[k][i] = commits ? s[k] : s_[k][i];
        });
        if (commits) put_states<V, Hint::keep>(at, n);
      });
    });
  }

  /// `committed`: the layer was measured, and early commit was allowed.
  __device__ void update(Scale<T> scale, bool committed) {
    with_variant(rule, [&](auto variant) {
      constexpr int V = variant;
      const bool concludes = Rule::kConcludes[V] && committed && rule.of_update;
#pragma unroll 1
      for (std::int64_t at = begin_; at < end_; at += Tile::kSize) {
        const int n = static_cast<int>(end_ - at < Tile::kSize ? end_ - at : Tile::kSize);
        if (!kept_) get_weights<Hint::stream>(at, n);
        if (!kept_ && !concludes) Tile::template get<G, Hint::stream>(g_, gradient_, at, n, aligned_);
        if (!kept_ || stateless_) get_states<V, Hint::stream>(at, n);
        Tile::each(n, [&](int i) {
          T s[kStates];
          for (int k = 0; k < kStates; ++k) s[k] = s_[k][i];
          const T u = concludes ? concluded<V>(s) : rule.template direction<V>(w_[i], g_[i], s, scale.in);
          w_[i] = rule.applied(w_[i], rule.update(w_[i], u, scale.in), scale.out);
          for (int k = 0; k < kStates; ++k) s_[k][i] = s[k];
        });
        put_weights(at, n);
        if (!concludes) put_states<V, Hint::stream>(at, n);
      }
    });
  }

 private:
  /// f(sum, at, n) adds a tile to its leaf's sums.
  template <class F>
  __device__ void leaves(Sums* slots, F f) {
#pragma unroll 1
    for (std::int64_t at = begin_; at < end_; ++slots) {
      const std::int64_t end = end_ - at < kLeaf ? end_ : at + kLeaf;
      Sums sum{};
#pragma unroll 1
      for (; at < end; at += Tile::kSize) {
        f(sum, at, static_cast<int>(end - at < Tile::kSize ? end - at : Tile::kSize));
      }
      at = end;
      sum = block_.reduce(sum);
      block_.once([&] { *slots = sum; });
    }
  }

  template <int V>
  __device__ T concluded(const T (&s)[kStates]) const {
    if constexpr (Rule::kConcludes[V]) {
      return rule.template conclude<V>(s);
    } else {
      return T(0);  // never reached
    }
  }

  static __device__ void add(Sums& sum, double weight, double measured) {
    sum.weight += weight * weight;  // the square of a float is exact in double
    sum.measured += measured * measured;
  }

  template <Hint hint>
  __device__ void get_weights(std::int64_t at, int n) {
    if (std::is_same_v<T, W> || layer_.weights != nullptr) {
      Tile::template get<T, hint>(w_, layer_.weights, at, n, aligned_);
    } else {
      Tile::template get<W, hint>(w_, layer_.rounded, at, n, aligned_);
    }
  }

  __device__ void put_weights(std::int64_t at, int n) {
    if (std::is_same_v<T, W> || layer_.weights != nullptr) {
      Tile::template put<T, Hint::stream>(w_, layer_.weights, at, n, aligned_);
    }
    if constexpr (!std::is_same_v<T, W>)
      Tile::template put<W, Hint::stream>(w_, layer_.rounded, at, n, aligned_);
  }

  /// f(k) for the states that a variant uses, k a constant.
  template <int V, class F>
  static __device__ void each_state(F f) {
    const auto each = [&]<int... K>(std::integer_sequence<int, K...>) {
      const auto one = [&](auto k) {
        if constexpr (Rule::kUses[V][k]) f(k);
      };
      (one(std::integral_constant<int, K>()), ...);
    };
    each(std::make_integer_sequence<int, kStates>());
  }

  template <int V, Hint hint>
  __device__ void get_states(std::int64_t at, int n) {
    each_state<V>([&](auto k) {
      if (!std::is_same_v<T, W> && has_16_bits(static_cast<Type>(layer_.state_type))) {
        Tile::template get<W, hint>(s_[k], layer_.states[k], at, n, aligned_);
      } else {
        Tile::template get<T, hint>(s_[k], layer_.states[k], at, n, aligned_);
      }
    });
  }

  template <int V, Hint hint>
  __device__ void put_states(std::int64_t at, int n) {
    each_state<V>([&](auto k) {
      if (!std::is_same_v<T, W> && has_16_bits(static_cast<Type>(layer_.state_type))) {
        Tile::template put<W, hint>(s_[k], layer_.states[k], at, n, aligned_);
      } else {
        Tile::template put<T, hint>(s_[k], layer_.states[k], at, n, aligned_);
      }
    });
  }

  Block& block_;
  const Layer& layer_;
  const void* gradient_;
  const std::int64_t begin_, end_;
  bool aligned_, kept_ = false, stateless_ = false;  // kept: all that measure() read is in the arrays
  T w_[kElements], g_[kElements], s_[kStates][kElements] = {};
};

/// Gradients of every type, and no more.
template <class Block, class Rule>
struct ScanChunk {
  const Rule rule;
  Block& block;
  const Layer& layer;
  const void* gradient;
  const Item& item;

  __device__ void scan(Sums* slots) {
    const auto of = [&]<class G>(std::type_identity<G>) {
      BlockChunk<Block, Rule, typename Rule::Value, G>(block, layer, gradient, rule, item).scan(slots);
    };
    if constexpr (std::is_same_v<typename Rule::Value, double>) {
      of(std::type_identity<double>());
    } else {
      const auto type = static_cast<Type>(layer.gradient_type);
      if (type == Type::float32) of(std::type_identity<float>());
      if (type == Type::bfloat16) of(std::type_identity<Bfloat16>());
      if (type == Type::float16) of(std::type_identity<Float16>());
    }
  }
  __device__ void measure(Sums*, bool) {}
  __device__ void update(Scale<typename Rule::Value>, bool) {}
};

/// `W` and `G`: what the parameters and the gradients of the launch hold; void where it only scans.
template <class W, class G>
class Block {
 public:
  using Order = DK_ARCH::Order;
  template <class T>
  using Atomic = DK_ARCH::Atomic<T>;
  static constexpr bool kOwnsUpdates = false;

  /// Every block writes down what the launch carries, for itself: all write the same. Read from the
  /// parameters wherever it is needed it would cost registers, and spills.
  __device__ Block(Shared& shared, const cuda::Launch& launch) : shared_(shared) {
    auto* const words = reinterpret_cast<std::int64_t*>(const_cast<double*>(launch.plan.rows));
    each(launch.n_carried, [&](std::int64_t i) { words[i] = launch.carried[i]; });
  }

  __device__ int workers() const { return static_cast<int>(gridDim.x); }

  template <template <class> class Rule, class Row, class F>
  __device__ void visit(const Layer& layer, const void* gradient, const Row& row, const Moment& now,
                        const Item& item, F f) {
    if constexpr (std::is_void_v<W>) {
      const auto in = [&]<class T>(std::type_identity<T>) {
        ScanChunk<Block, Rule<T>> chunk{Rule<T>(row, now), *this, layer, gradient, item};
        f(chunk);
      };
      static_cast<Type>(layer.type) == Type::float64 ? in(std::type_identity<double>())
                                                     : in(std::type_identity<float>());
    } else {
      using T = std::conditional_t<std::is_same_v<W, double>, double, float>;
      BlockChunk<Block, Rule<T>, W, G> chunk(*this, layer, gradient, Rule<T>(row, now), item);
      f(chunk);
    }
  }

  /// One thread runs f once all have come, and all go on with its result: what they did before is done before
  /// it, and what it has seen they see.
  template <class F>
  __device__ auto agree(F f) {
    __syncthreads();
    if (threadIdx.x == 0) shared_.word = static_cast<std::uint64_t>(f());
    __syncthreads();
    return static_cast<decltype(f())>(shared_.word);
  }
  template <class F>
  __device__ void once(F f) {
    if (threadIdx.x == 0) f();
  }
  __device__ void pause() { rest(); }

  template <class F>
  __device__ void each(std::int64_t n, F f) {
    for (std::int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
  }

  /// The sum of all threads' sums, by a fixed tree.
  __device__ Sums reduce(Sums sum) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
      sum.weight += shuffle_xor(sum.weight, half);
      sum.measured += shuffle_xor(sum.measured, half);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared_.parts[threadIdx.x / 32] = sum;
    __syncthreads();
    Sums total{};
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) {
      total.weight += shared_.parts[i].weight;
      total.measured += shared_.parts[i].measured;
    }
    return total;
  }

  __device__ Sums add_up(const Sums* slots, std::int64_t n) {
    __syncthreads();  // this block's own slots among them
    Sums sum{};
#pragma unroll 1
    for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
      sum.weight += slots[i].weight;
      sum.measured += slots[i].measured;
    }
    return reduce(sum);
  }

 private:
  Shared& shared_;
};

}  // namespace dk::DK_ARCH
