// The Python module tailor_engine._cuda: launchers that take raw addresses and a stream, and the
// pure functions that choose their launch, which tests call without a GPU.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels; raw addresses and a stream in, nothing out; importable without a driver.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const tailor::CudaError& error) {
      const py::object type = py::module_::import("tailor_engine.errors").attr("TailorError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });
  m.def("int4_dequantize", &tailor::int4_dequantize, py::call_guard<py::gil_scoped_release>());
  m.def("int4_dequantize_panels", &tailor::int4_dequantize_panels,
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "int4_dequantize_config",
      [](std::int64_t values) {
        const tailor::LaunchConfig config = tailor::int4_dequantize_config(values);
        return py::make_tuple(config.blocks, config.threads);
      },
      "(blocks, threads) for a number of values.");
  py::class_<tailor::Machine>(m, "Machine")
      .def(py::init<int, int>(), py::arg("multiprocessors"), py::arg("largest_cluster"));
  py::class_<tailor::Linear>(m, "Linear")
      .def(py::init([](tailor::address x, int dtype, int rows, int width, int features,
                       tailor::address data, tailor::address scale, tailor::address zero,
                       tailor::address bias, int bias_dtype, tailor::address y,
                       tailor::address workspace) {
        return tailor::Linear{x,     dtype, rows, width,      features, data,
                              scale, zero,  bias, bias_dtype, y,        workspace};
      }));
  m.def("int4_linear", &tailor::int4_linear, py::call_guard<py::gil_scoped_release>());
  m.def("int8_linear", &tailor::int8_linear, py::call_guard<py::gil_scoped_release>());
  m.def("small_batch_workspace", &tailor::small_batch_workspace);
  m.attr("SMALL_BATCH_ROWS") = tailor::kSmallBatchRows;
  m.def("small_batch_config", [](int rows, int features, int width, int bits, int element,
                                 const tailor::Machine& machine) {
    const tailor::SmallBatchConfig c =
        tailor::small_batch_config(rows, features, width, bits, element, machine);
    using namespace pybind11::literals;
    return py::dict("tiles"_a = c.tiles, "warps_n"_a = c.warps_n, "warps_k"_a = c.warps_k,
                    "splits"_a = c.splits, "blocks"_a = c.blocks,
                    "threads"_a = tailor::kSmallBatchThreads, "chunk_steps"_a = c.chunk_steps,
                    "token_bytes"_a = c.token_bytes, "shared_bytes"_a = c.shared_bytes);
  });
}
