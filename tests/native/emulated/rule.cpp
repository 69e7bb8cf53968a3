// Compiled once per rule, as csrc/cuda/kernels.cu is.
#define DK_ARCH emulated_block
#include "block.h"
// After what stands in for the compiler:
#include "cuda/block.cuh"
#include "rule.h"
#include "rules/all.h"

namespace dk::DK_ARCH {
namespace {

template <class W, class G>
void layerwise_step(const cuda::Launch& launch, unsigned blocks) {
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < blocks; ++i) {
    threads.emplace_back([&] {
      Shared shared;
      ::emulated::Fibers(kThreads, blocks).run([&] {
        Block<W, G> block(shared, launch);
        run_worker<Block<W, G>, DK_RULE>(block, launch.plan);
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace dk::DK_ARCH

using namespace dk::DK_ARCH;

extern const Emulated DK_KERNELS[dk::cuda::kPairs] = {
    {0, 0, layerwise_step<float, float>},       {1, 1, layerwise_step<double, double>},
    {2, 2, layerwise_step<Bfloat16, Bfloat16>}, {2, 0, layerwise_step<Bfloat16, float>},
    {3, 3, layerwise_step<Float16, Float16>},   {3, 0, layerwise_step<Float16, float>},
    {-1, -1, layerwise_step<void, void>},
};
