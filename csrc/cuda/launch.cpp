#include "launch.h"

#include <algorithm>
#include <stdexcept>

#include "runtime.h"

#define DK_ARCH host  // for the names of the rules; no formula runs from here
#include "../rules/all.h"

namespace dk::cuda {

#define DK_DECLARE(name, Rule) extern const Kernel kKernelsOf##Rule[kPairs];
DK_FOR_EACH_RULE(DK_DECLARE)

namespace {

#define DK_TABLE(name, Rule) kKernelsOf##Rule,
const Kernel* const kFamilies[] = {DK_FOR_EACH_RULE(DK_TABLE)};

/// Takes a device for this thread, and gives back the one before.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    DK_CHECK(cudaGetDevice(&before_));
    if (device != before_) DK_CHECK(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
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
    const std::string why = why_no_driver();
    if (!why.empty() || device < 0) return why;
    const OnDevice on(device);
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, find(0, Type::float32, Type::float32));
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      static_cast<void>(cudaGetLastError());
      const std::string arch = architecture(device);
      return "no kernel image for " + (kPrefix + arch) + ": rebuild with -C cmake.define." + kArchitectures +
             "=" + arch;
    }
    check(error, "cudaFuncGetAttributes");
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

void launch(int family, Type weights, Type gradient, Launch& launch, int device, void* stream) {
  const void* const function = find(family, weights, gradient);
  const OnDevice on(device);
  const auto most = static_cast<std::int64_t>(resident_blocks(function, device));
  const auto blocks = static_cast<unsigned>(std::min(launch.plan.n_items, most));
  void* arguments[] = {&launch};
  DK_CHECK(cudaLaunchKernel(function, dim3(blocks), dim3(kThreads), arguments, 0,
                            static_cast<cudaStream_t>(stream)));
}

}  // namespace dk::cuda
