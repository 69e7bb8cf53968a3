// What the compilers of NVIDIA (CUDA) and AMD (HIP) name differently; all else of csrc/cuda is one text.
#pragma once
#include "../arch.h"

#if defined(__HIP__)
#include <hip/hip_runtime.h>
#define __grid_constant__
#else
#include <cuda/atomic>
#endif

namespace dk::DK_ARCH {

/// What is read or written for the last time leaves the cache first.
enum class Hint { keep, stream };

/// Elements a thread may hold at once, before the compiler spills.
#if defined(__HIP__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
constexpr int kMost = 8;
#else
constexpr int kMost = 16;
#endif

#if defined(__HIP__)

using FourWords = unsigned __attribute__((ext_vector_type(4)));

template <Hint hint>
__device__ uint4 load16(const uint4* from) {
  if constexpr (hint == Hint::keep) return *from;
  const FourWords x = __builtin_nontemporal_load(reinterpret_cast<const FourWords*>(from));
  return {x.x, x.y, x.z, x.w};
}

template <Hint hint>
__device__ void store16(uint4* to, uint4 value) {
  if constexpr (hint == Hint::keep) {
    *to = value;
  } else {
    __builtin_nontemporal_store(FourWords{value.x, value.y, value.z, value.w},
                                reinterpret_cast<FourWords*>(to));
  }
}

struct Order {
  static constexpr int relaxed = __ATOMIC_RELAXED, acquire = __ATOMIC_ACQUIRE, release = __ATOMIC_RELEASE,
                       acq_rel = __ATOMIC_ACQ_REL;
};

template <class T>
struct Atomic {
  T& at;
  explicit __device__ Atomic(T& at) : at(at) {}
  __device__ T load(int order) { return __hip_atomic_load(&at, order, __HIP_MEMORY_SCOPE_AGENT); }
  __device__ void store(T x, int order) { __hip_atomic_store(&at, x, order, __HIP_MEMORY_SCOPE_AGENT); }
  __device__ T fetch_add(T x, int order) {
    return __hip_atomic_fetch_add(&at, x, order, __HIP_MEMORY_SCOPE_AGENT);
  }
};

/// The value of the lane whose number differs by `mask`, below 32: a wavefront may have 64 lanes.
__device__ inline double shuffle_xor(double value, int mask) { return __shfl_xor(value, mask); }

__device__ inline void rest() { __builtin_amdgcn_s_sleep(2); }

#else

template <Hint hint>
__device__ uint4 load16(const uint4* from) {
  return hint == Hint::keep ? __ldcg(from) : __ldcs(from);
}

template <Hint hint>
__device__ void store16(uint4* to, uint4 value) {
  hint == Hint::keep ? __stcg(to, value) : __stcs(to, value);
}

using Order = ::cuda::std::memory_order;

template <class T>
using Atomic = ::cuda::atomic_ref<T, ::cuda::thread_scope_device>;

__device__ inline double shuffle_xor(double value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

__device__ inline void rest() { __nanosleep(64); }

#endif

}  // namespace dk::DK_ARCH
