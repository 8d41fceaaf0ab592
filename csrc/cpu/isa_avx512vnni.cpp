#include "prelude.h"

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define TAILOR_AVX2 1
#define TAILOR_AVX512 1
namespace tailor::avx512vnni {
#include "ops.h"
#include "probes.h"
}  // namespace tailor::avx512vnni
#pragma GCC pop_options

namespace tailor {
void bind_avx512vnni(pybind11::module_& parent) {
  auto level = parent.def_submodule("avx512vnni");
#define TAILOR_BIND(op) \
  level.def(#op, &avx512vnni::op, pybind11::call_guard<pybind11::gil_scoped_release>());
  TAILOR_OPS(TAILOR_BIND)
  TAILOR_STEPS(TAILOR_BIND)
  TAILOR_PROBES(TAILOR_BIND)
  TAILOR_CONFIGS(TAILOR_BIND)
}
}  // namespace tailor

#endif  // x86-64
