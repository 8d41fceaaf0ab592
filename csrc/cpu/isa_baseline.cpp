#include "prelude.h"

namespace tailor::baseline {
#include "ops.h"
#include "probes.h"
}  // namespace tailor::baseline

namespace tailor {
void bind_baseline(pybind11::module_& parent) {
  auto level = parent.def_submodule("baseline");
#define TAILOR_BIND(op) \
  level.def(#op, &baseline::op, pybind11::call_guard<pybind11::gil_scoped_release>());
  TAILOR_OPS(TAILOR_BIND)
  TAILOR_STEPS(TAILOR_BIND)
  TAILOR_PROBES(TAILOR_BIND)
  TAILOR_CONFIGS(TAILOR_BIND)
}
}  // namespace tailor
