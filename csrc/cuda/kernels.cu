// Compiled once per rule, with -DDK_RULE=<its class> and -DDK_KERNELS=kKernelsOf<its class>.
#define DK_ARCH cuda_block
#include "vendor.cuh"
// After HIP's own functions, which clang looks up where they are used:
#include "../rules/all.h"
#include "block.cuh"
#include "kernels.h"

namespace dk::DK_ARCH {
namespace {

template <class W, class G>
__global__ void __launch_bounds__(kThreads, 2) layerwise_step(const __grid_constant__ cuda::Launch launch) {
  __shared__ Shared shared;
  Block<W, G> block(shared, launch);
  run_worker<Block<W, G>, DK_RULE>(block, launch.plan);
}

template <class W, class G>
const void* kernel() {
  return reinterpret_cast<const void*>(&layerwise_step<W, G>);
}

}  // namespace
}  // namespace dk::DK_ARCH

namespace dk::cuda {

using namespace dk::DK_ARCH;

extern const Kernel DK_KERNELS[kPairs] = {
    {Type::float32, Type::float32, kernel<float, float>()},
    {Type::float64, Type::float64, kernel<double, double>()},
    {Type::bfloat16, Type::bfloat16, kernel<Bfloat16, Bfloat16>()},
    {Type::bfloat16, Type::float32, kernel<Bfloat16, float>()},
    {Type::float16, Type::float16, kernel<Float16, Float16>()},
    {Type::float16, Type::float32, kernel<Float16, float>()},
    {kNone, kNone, kernel<void, void>()},
};

}  // namespace dk::cuda
