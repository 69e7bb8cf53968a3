// pybind11 only; no logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <span>
#include <stdexcept>
#include <vector>

#include "cpu/launch.h"
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

/// layers: (n, 8 + kMaxStates) = weights, its type, the gradient's type, rounded, its type, step, size,
/// options, states...; items: (m, 4) = begin, end, layer, kind.
std::unique_ptr<dk::Engine> make_engine(int family, int target, const Integers& layer_table,
                                        const Integers& item_table) {
  const auto l = layer_table.unchecked<2>();
  const auto t = item_table.unchecked<2>();
  std::vector<dk::Layer> layers(l.shape(0));
  for (py::ssize_t i = 0; i < l.shape(0); ++i) {
    dk::Layer& layer = layers[i];
    layer = {};
    layer.weights = reinterpret_cast<void*>(l(i, 0));
    layer.weights_type = static_cast<dk::Type>(l(i, 1));
    layer.gradient_type = static_cast<dk::Type>(l(i, 2));
    layer.rounded = reinterpret_cast<void*>(l(i, 3));
    layer.rounded_type = static_cast<dk::Type>(l(i, 4));
    layer.step = reinterpret_cast<float*>(l(i, 5));
    layer.size = l(i, 6);
    layer.options = static_cast<std::int32_t>(l(i, 7));
    for (int k = 0; k < dk::kMaxStates; ++k) layer.states[k] = reinterpret_cast<void*>(l(i, 8 + k));
  }
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
  for (std::size_t i = 0; i < engine.layers.size(); ++i) {
    engine.layers[i].gradient = reinterpret_cast<void*>(gradients.data()[i]);
  }
  const double* const row = rows.data();
  const py::gil_scoped_release release;
  engine.run(row, threads, grad_scale, max_grad_norm, skip_nonfinite);
}

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
  m.def("targets", [] {
    py::list all;
    for (const dk::Target& target : dk::targets()) all.append(py::make_tuple(target.name, target.supported));
    return all;
  });
  m.def("openmp_library", &dk::openmp_library);
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
