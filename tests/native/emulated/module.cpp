// csrc/bindings.cpp's cuda_launch, with blocks of fibers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "cuda/arguments.h"
#include "rule.h"

#define DK_ARCH emulated_names
#include "rules/all.h"

namespace py = pybind11;
using namespace dk;
using Integers = py::array_t<std::int64_t, py::array::c_style>;

#define DK_DECLARE(name, Rule) extern const Emulated kKernelsOf##Rule[dk::cuda::kPairs];
DK_FOR_EACH_RULE(DK_DECLARE)

namespace {

#define DK_TABLE(name, Rule) kKernelsOf##Rule,
const Emulated* const kFamilies[] = {DK_FOR_EACH_RULE(DK_TABLE)};

unsigned most_blocks = 3;

void launch(int family, int weights, int gradient, const cuda::Tables& tables, const cuda::Counts& counts,
            const Integers& carried, const cuda::Scalar& grad_scale, const cuda::Scalar& found_inf,
            double max_grad_norm, bool skip_nonfinite, bool judged, int, std::intptr_t) {
  const cuda::Launch launch =
      cuda::launch_of(tables, counts, {carried.data(), static_cast<std::size_t>(carried.size())}, grad_scale,
                      found_inf, max_grad_norm, skip_nonfinite, judged);
  const Emulated* const kernels = kFamilies[family];
  const auto* const kernel = std::find_if(kernels, kernels + cuda::kPairs, [&](const Emulated& k) {
    return k.weights == weights && k.gradient == gradient;
  });
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(launch.plan.n_items, most_blocks));
  const py::gil_scoped_release release;
  kernel->run(launch, blocks);
}

}  // namespace

PYBIND11_MODULE(emulated_cuda, m) {
  m.def("set_blocks", [](unsigned n) { most_blocks = n; });
  m.def("cuda_launch", &launch);
  m.attr("LAUNCH_WORDS") = cuda::Launch::kCarried;
}
