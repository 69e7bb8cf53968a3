// pybind11 only; no logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <vector>

#include "collect.h"
#include "cpu/launch.h"
#ifdef DK_GPU
#include "cuda/arguments.h"
#include "cuda/launch.h"
#endif
#include "memory.h"

namespace py = pybind11;
using Integers = py::array_t<std::int64_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

namespace {

dk::Memory::Tensors in(const py::list& list) { return {PySequence_Fast_ITEMS(list.ptr()), list.size()}; }

std::unique_ptr<dk::Memory> make_memory(const py::object& exchange, const py::list& tensors) {
  const DLExchange* known = dk::Memory::exchange_in(exchange.ptr());
  if (known == nullptr) throw std::invalid_argument("exchange: no DLPack exchange of version 1");
  auto memory = std::make_unique<dk::Memory>(*known);
  if (!memory->learn(in(tensors))) throw py::error_already_set();
  return memory;
}

/// date_kernels.collect.collect.
py::object collect(const py::list& members, const py::list& params, const py::object& state,
                   const py::list& states, const py::list& saved, const py::list& columns) {
  if (!dk::are_members(members.ptr(), params.ptr()) || !dk::are_values(state.ptr(), states.ptr()))
    return py::none();
  const auto same = [](dk::Found found) {
    if (found == dk::Found::kError) throw py::error_already_set();
    return found == dk::Found::kSame;
  };
  for (const py::handle column : columns) {
    const auto pair = py::reinterpret_borrow<py::tuple>(column);
    if (!same(dk::take_up(saved.ptr(), pair[0].ptr(), pair[1].ptr()))) return py::none();
  }
  py::list grads(params.size());
  return same(dk::take_gradients(params.ptr(), grads.ptr())) ? grads : py::object(py::none());
}

/// layers: (n, 13), as dk::Layer; items: (m, 4) = begin, end, layer, kind.
std::unique_ptr<dk::Engine> make_engine(int family, int target, const Integers& layer_table,
                                        const Integers& item_table) {
  if (layer_table.ndim() != 2 || layer_table.shape(1) * sizeof(std::int64_t) != sizeof(dk::Layer)) {
    throw std::invalid_argument("layers: a row is not a layer");
  }
  std::vector<dk::Layer> layers(layer_table.shape(0));
  if (!layers.empty()) std::memcpy(layers.data(), layer_table.data(), layer_table.nbytes());
  const auto t = item_table.unchecked<2>();
  std::vector<dk::Item> items(t.shape(0));
  for (py::ssize_t i = 0; i < t.shape(0); ++i) {
    items[i] = {t(i, 0), t(i, 1), static_cast<std::int32_t>(t(i, 2)), static_cast<dk::Kind>(t(i, 3))};
  }
  return std::make_unique<dk::Engine>(family, dk::targets()[target], std::move(layers), std::move(items));
}

/// tables: (addresses of gradients, rows), inside a tuple: pybind11 asks the heap for each array among the
/// arguments, and for a seventh of those.
void run(dk::Engine& engine, const py::tuple& tables, int threads, double grad_scale, double max_grad_norm,
         bool skip_nonfinite) {
  const auto gradients = py::reinterpret_borrow<Integers>(tables[0]);
  const auto rows = py::reinterpret_borrow<Doubles>(tables[1]);
  static_assert(sizeof(void*) == sizeof(std::int64_t));
  const auto* const addresses = reinterpret_cast<const void* const*>(gradients.data());
  const double* const row = rows.data();
  const py::gil_scoped_release release;
  engine.run(addresses, row, threads, grad_scale, max_grad_norm, skip_nonfinite);
}

#ifdef DK_GPU
void cuda_launch(int family, int weights, int gradient, const dk::cuda::Tables& tables,
                 const dk::cuda::Counts& counts, const Integers& carried, const dk::cuda::Scalar& grad_scale,
                 const dk::cuda::Scalar& found_inf, double max_grad_norm, bool skip_nonfinite, bool judged,
                 int device, std::intptr_t stream) {
  dk::cuda::Launch launch =
      dk::cuda::launch_of(tables, counts, {carried.data(), static_cast<std::size_t>(carried.size())},
                          grad_scale, found_inf, max_grad_norm, skip_nonfinite, judged);
  dk::cuda::launch(family, static_cast<dk::Type>(weights), static_cast<dk::Type>(gradient), launch, device,
                   reinterpret_cast<void*>(stream));
}
#endif

py::tuple names(std::span<const char* const> all) {
  py::list list;
  for (const char* name : all) list.append(name);
  return py::tuple(list);
}

Integers view(py::object owner, const std::vector<std::int64_t>& data) {
  return Integers(static_cast<py::ssize_t>(data.size()), data.data(), std::move(owner));
}

py::array_t<double> view(py::object owner, const double* data, py::ssize_t rows, py::ssize_t columns) {
  return py::array_t<double>({rows, columns}, data, std::move(owner));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("LEAF") = dk::kLeaf;
  m.attr("MAX_STATES") = dk::kMaxStates;
  m.attr("TYPES") = names(dk::kTypeNames);
  m.attr("REPORT_FIELDS") = names(dk::kReportFields);
  py::dict families;
  for (const dk::Family& family : dk::families()) {
    families[family.name] = py::make_tuple(families.size(), names(family.fields), names(family.states));
  }
  m.attr("FAMILIES") = families;
#ifdef DK_GPU
  m.attr("GPU") = DK_GPU;
  m.attr("LAUNCH_WORDS") = dk::cuda::Launch::kCarried;
  m.def("cuda_why_not", &dk::cuda::why_not, py::arg("device"));
  m.def("cuda_launch", &cuda_launch, py::arg("family"), py::arg("weights"), py::arg("gradient"),
        py::arg("tables"), py::arg("counts"), py::arg("carried"), py::arg("grad_scale"), py::arg("found_inf"),
        py::arg("max_grad_norm"), py::arg("skip_nonfinite"), py::arg("judged"), py::arg("device"),
        py::arg("stream"));
#else
  m.attr("GPU") = "";
#endif
  m.def("targets", [] {
    py::list all;
    for (const dk::Target& target : dk::targets()) all.append(py::make_tuple(target.name, target.supported));
    return all;
  });
  m.def("openmp_library", &dk::openmp_library);
  m.def("collect", &collect, py::arg("members"), py::arg("params"), py::arg("state"), py::arg("states"),
        py::arg("saved"), py::arg("columns"));
  py::class_<dk::Memory>(m, "Memory")
      .def_static(
          "knows",
          [](const py::object& exchange) { return dk::Memory::exchange_in(exchange.ptr()) != nullptr; },
          py::arg("exchange"))
      .def(py::init(&make_memory), py::arg("exchange"), py::arg("tensors"))
      .def(
          "fits", [](dk::Memory& memory, const py::list& tensors) { return memory.fits(in(tensors)); },
          py::arg("tensors"))
      .def_property_readonly("renewed", &dk::Memory::renewed)
      .def_property_readonly("doubtful",
                             [](py::object self) { return view(self, self.cast<dk::Memory&>().doubtful()); })
      .def_property_readonly(
          "addresses", [](py::object self) { return view(self, self.cast<dk::Memory&>().addresses()); });
  py::class_<dk::Engine>(m, "Engine")
      .def(py::init(&make_engine), py::arg("family"), py::arg("target"), py::arg("layers"), py::arg("items"))
      .def("check_counters", &dk::Engine::check_counters)
      .def("run", &run, py::arg("tables"), py::arg("threads"), py::arg("grad_scale"),
           py::arg("max_grad_norm"), py::arg("skip_nonfinite"))
      .def("skip", &dk::Engine::skip)
      .def_property_readonly("reports",
                             [](py::object self) {
                               const auto& reports = self.cast<dk::Engine&>().reports;
                               return view(self, reinterpret_cast<const double*>(reports.data()),
                                           static_cast<py::ssize_t>(reports.size()),
                                           sizeof(dk::LayerReport) / sizeof(double));
                             })
      .def_property_readonly("verdict", [](py::object self) {
        const auto& v = self.cast<dk::Engine&>().verdict;
        return py::make_tuple(v.total_norm, v.clip, v.skip != 0);
      });
}
