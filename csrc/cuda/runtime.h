// CUDA's runtime, or AMD's under CUDA's names, and what only one of them tells.
#pragma once
#include <stdexcept>
#include <string>

#if defined(DK_HIP)
#include <hip/hip_runtime_api.h>
#define cudaDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define cudaDeviceGetAttribute hipDeviceGetAttribute
#define cudaErrorInvalidDeviceFunction hipErrorInvalidDeviceFunction
#define cudaErrorNoKernelImageForDevice hipErrorNoBinaryForGpu
#define cudaError_t hipError_t
#define cudaFuncAttributes hipFuncAttributes
#define cudaFuncGetAttributes hipFuncGetAttributes
#define cudaGetDevice hipGetDevice
#define cudaGetErrorName hipGetErrorName
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaLaunchKernel hipLaunchKernel
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor hipOccupancyMaxActiveBlocksPerMultiprocessor
#define cudaSetDevice hipSetDevice
#define cudaStream_t hipStream_t
#define cudaSuccess hipSuccess
#else
#include <cuda_runtime_api.h>
#endif

namespace dk::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}
#define DK_TEXT(call) #call
#define DK_CHECK(call) check(call, DK_TEXT(call))  // by the names that AMD gives them, too

#if defined(DK_HIP)

inline std::string why_no_driver() { return ""; }  // its runtime and its driver are one

inline std::string architecture(int device) {
  hipDeviceProp_t properties{};
  DK_CHECK(hipGetDeviceProperties(&properties, device));
  const std::string name = properties.gcnArchName;
  return name.substr(0, name.find(':'));
}
constexpr const char* kPrefix = "";
constexpr const char* kArchitectures = "CMAKE_HIP_ARCHITECTURES";

#else

/// Why no kernel can run on any device here; empty where some may.
inline std::string why_no_driver() {
  int driver = 0, runtime = 0;
  DK_CHECK(cudaDriverGetVersion(&driver));
  DK_CHECK(cudaRuntimeGetVersion(&runtime));
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 >= runtime / 1000) return "";
  const auto name = [](int version) {
    return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "the driver knows " + name(driver) + ", but the kernels were compiled by " + name(runtime) +
         ": update the driver, or rebuild with an older toolkit";
}

inline std::string architecture(int device) {
  int major = 0, minor = 0;
  DK_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  DK_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return std::to_string(major * 10 + minor);
}
constexpr const char* kPrefix = "sm_";
constexpr const char* kArchitectures = "CMAKE_CUDA_ARCHITECTURES";

#endif

}  // namespace dk::cuda
