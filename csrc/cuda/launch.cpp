#include "launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>

#define DK_ARCH host  // for the names of the rules; no formula runs from here
#include "../rules/all.h"

namespace dk::cuda {

#define DK_DECLARE(name, Rule) extern const Kernel kKernelsOf##Rule[kPairs];
DK_FOR_EACH_RULE(DK_DECLARE)

namespace {

#define DK_TABLE(name, Rule) kKernelsOf##Rule,
const Kernel* const kFamilies[] = {DK_FOR_EACH_RULE(DK_TABLE)};

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}
#define DK_CHECK(call) check(call, #call)

/// Takes a device for this thread, and gives back the one before.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    DK_CHECK(cudaGetDevice(&before_));
    if (device != before_) DK_CHECK(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

const void* find(int family, Type weights, Type gradient) {
  const Kernel* const kernels = kFamilies[family];
  const auto found = std::find_if(kernels, kernels + kPairs, [&](const Kernel& kernel) {
    return kernel.weights == weights && kernel.gradient == gradient;
  });
  if (found == kernels + kPairs) throw std::invalid_argument("no kernel for this pair of dtypes");
  return found->function;
}

/// Blocks that run at once. More would do no harm, and find no items left.
int resident_blocks(const void* function, int device) {
  int multiprocessors = 0, blocks = 0;
  DK_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  DK_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, 0));
  return std::max(1, multiprocessors * blocks);
}

}  // namespace

std::string why_not(int device) {
  try {
    int driver = 0, runtime = 0;
    DK_CHECK(cudaDriverGetVersion(&driver));
    DK_CHECK(cudaRuntimeGetVersion(&runtime));
    if (driver == 0) return "there is no NVIDIA driver";
    if (driver / 1000 < runtime / 1000) {
      return "the driver knows CUDA " + std::to_string(driver / 1000) + "." +
             std::to_string(driver % 1000 / 10) + ", but the kernels were compiled by CUDA " +
             std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10) +
             ": update the driver, or rebuild with an older toolkit";
    }
    if (device < 0) return "";
    const OnDevice on(device);
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, find(0, Type::float32, Type::float32));
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      int major = 0, minor = 0;
      DK_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
      DK_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
      const std::string arch = std::to_string(major * 10 + minor);
      return "no kernel image for sm_" + arch +
             ": rebuild with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=" + arch;
    }
    check(error, "cudaFuncGetAttributes");
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

void launch(int family, Type weights, Type gradient, const Plan& plan, int device, void* stream) {
  const void* const function = find(family, weights, gradient);
  const OnDevice on(device);
  const auto most = static_cast<std::int64_t>(resident_blocks(function, device));
  const auto blocks = static_cast<unsigned>(std::min(plan.n_items, most));
  Plan copy = plan;
  void* arguments[] = {&copy};
  DK_CHECK(cudaLaunchKernel(function, dim3(blocks), dim3(kThreads), arguments, 0,
                            static_cast<cudaStream_t>(stream)));
}

}  // namespace dk::cuda
