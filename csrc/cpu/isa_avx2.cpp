#include "prelude.h"

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define TAILOR_AVX2 1
namespace tailor::avx2 {
#include "ops.h"
#include "probes.h"
}  // namespace tailor::avx2
#pragma GCC pop_options

namespace tailor {
void bind_avx2(pybind11::module_& parent) {
  auto level = parent.def_submodule("avx2");
#define TAILOR_BIND(op) \
  level.def(#op, &avx2::op, pybind11::call_guard<pybind11::gil_scoped_release>());
  TAILOR_OPS(TAILOR_BIND)
  TAILOR_STEPS(TAILOR_BIND)
  TAILOR_PROBES(TAILOR_BIND)
  TAILOR_CONFIGS(TAILOR_BIND)
}
}  // namespace tailor

#endif  // x86-64
