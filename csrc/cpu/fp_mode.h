// The caller's rounding and denormal mode, carried over to a worker while it works: MXCSR on x86-64, FPCR on
// aarch64.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dk {

using FpMode = std::uint64_t;

inline FpMode fp_mode() {
#if defined(__x86_64__)
  return _mm_getcsr();
#elif defined(__aarch64__)
  FpMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

inline void set_fp_mode([[maybe_unused]] FpMode mode) {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" ::"r"(mode));
#endif
}

/// Sets a mode and restores the one before, with the exception flags that were raised before.
class ScopedFpMode {
 public:
  explicit ScopedFpMode(FpMode mode) : before_(fp_mode()) { set_fp_mode(mode); }
  ~ScopedFpMode() { set_fp_mode(before_); }
  ScopedFpMode(const ScopedFpMode&) = delete;
  ScopedFpMode& operator=(const ScopedFpMode&) = delete;

 private:
  FpMode before_;
};

}  // namespace dk
