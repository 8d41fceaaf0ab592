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
  m.def(
      "int4_dequantize_config",
      [](std::int64_t values) {
        const tailor::LaunchConfig config = tailor::int4_dequantize_config(values);
        return py::make_tuple(config.blocks, config.threads);
      },
      "(blocks, threads) for a number of values.");
}
