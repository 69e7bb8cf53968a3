// The namespace of everything that is compiled once per instruction set. The same template built with
// different -m flags has ONE mangled name, and the linker keeps whichever it meets first: an AVX-512 body may
// then serve the baseline. A namespace per instruction set keeps them apart.
#pragma once

#ifndef DK_ARCH
#error "compile with -DDK_ARCH=<name of the instruction set>"
#endif

#if defined(__CUDACC__)
#define DK_INLINE __host__ __device__ __forceinline__
#define DK_WORK __device__ __forceinline__
#elif defined(__HIP__)  // whose compiler has these words from a header
#define DK_INLINE inline __attribute__((host, device, always_inline))
#define DK_WORK inline __attribute__((device, always_inline))
#else
#define DK_INLINE inline __attribute__((always_inline))
#define DK_WORK inline
#endif
