// A thread block on one OS thread: its lanes are fibers, which take turns from barrier to barrier. So the
// text of csrc/cuda/block.cuh runs, and is tested, where there is no GPU; several blocks run at once.
#pragma once
#include <ucontext.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __CUDACC__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};

namespace emulated {

struct Dimension {
  unsigned x;
};

/// The lanes of a block.
class Fibers {
 public:
  Fibers(unsigned lanes, unsigned blocks) : contexts_(lanes), words_(lanes), blocks_(blocks) {}

  void run(const std::function<void()>& work) {
    constexpr std::size_t kStack = 1 << 17;
    work_ = &work;
    running = this;
    const auto stacks = std::make_unique<char[]>(kStack * contexts_.size());
    for (std::size_t i = 0; i < contexts_.size(); ++i) {
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks.get() + i * kStack;
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = nullptr;
      makecontext(&contexts_[i], &Fibers::enter, 0);
    }
    lane_ = 0;
    swapcontext(&home_, &contexts_[0]);
  }

  /// On to the next lane: a lane goes on once all others have come here, too. From one barrier to the next
  /// the lanes run upwards, then downwards: a barrier that is missing shows on one of the two ways.
  void meet() {
    const unsigned self = lane_;
    if (is_last()) {
      upwards_ = !upwards_;
      return;
    }
    lane_ = next();
    swapcontext(&contexts_[self], &contexts_[lane_]);
  }

  template <class T>
  T exchange(T value, unsigned with) {
    static_assert(sizeof(T) == sizeof(std::uint64_t));
    std::memcpy(&words_[lane_], &value, sizeof value);
    meet();
    std::memcpy(&value, &words_[with], sizeof value);
    meet();
    return value;
  }

  unsigned lane() const { return lane_; }
  unsigned blocks() const { return blocks_; }

  static thread_local Fibers* running;

 private:
  static void enter() {
    Fibers* const self = running;
    (*self->work_)();
    // All lanes end together: one after the other, and the last goes home.
    if (self->is_last()) setcontext(&self->home_);
    self->lane_ = self->next();
    setcontext(&self->contexts_[self->lane_]);
  }

  bool is_last() const { return lane_ == (upwards_ ? contexts_.size() - 1 : 0); }
  unsigned next() const { return upwards_ ? lane_ + 1 : lane_ - 1; }

  std::vector<ucontext_t> contexts_;
  std::vector<std::uint64_t> words_;
  ucontext_t home_{};
  const std::function<void()>* work_ = nullptr;
  unsigned lane_ = 0;
  bool upwards_ = true;
  const unsigned blocks_;
};

inline thread_local Fibers* Fibers::running = nullptr;

inline Dimension thread_index() { return {Fibers::running->lane()}; }
inline Dimension grid() { return {Fibers::running->blocks()}; }

}  // namespace emulated

#define threadIdx (::emulated::thread_index())
#define gridDim (::emulated::grid())

inline void __syncthreads() { emulated::Fibers::running->meet(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  emulated::Fibers* const fibers = emulated::Fibers::running;
  return fibers->exchange(value, fibers->lane() ^ static_cast<unsigned>(mask));
}
inline void __nanosleep(unsigned) { std::this_thread::sleep_for(std::chrono::microseconds(1)); }

// What a GPU would stop at, an access that is not aligned, is lost here: so tests see it.
inline bool is_aligned(const uint4* at) { return reinterpret_cast<std::uintptr_t>(at) % sizeof(uint4) == 0; }
inline uint4 __ldcg(const uint4* from) { return is_aligned(from) ? *from : uint4{}; }
inline uint4 __ldcs(const uint4* from) { return __ldcg(from); }
inline void __stcg(uint4* to, uint4 value) {
  if (is_aligned(to)) *to = value;
}
inline void __stcs(uint4* to, uint4 value) { __stcg(to, value); }
