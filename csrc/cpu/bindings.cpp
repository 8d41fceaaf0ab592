// The Python module tailor_engine._cpu: one submodule per instruction-set level, and which of them
// this processor can run. Dispatch is Python's (ops/_op.py).
#include "prelude.h"

namespace tailor {

void bind_baseline(pybind11::module_&);
#if defined(__x86_64__)
void bind_avx2(pybind11::module_&);
void bind_avx512vnni(pybind11::module_&);
#endif

// Why this processor cannot run a level; empty when it can.
std::string missing(const std::string& level) {
  if (level == "baseline") return "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == "avx2") {
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c");
    return has ? "" : "this processor has no AVX2, FMA and F16C";
  }
  if (level == "avx512vnni") {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni");
    return has ? "" : "this processor has no AVX-512 with VNNI";
  }
  return "no kernel of this version uses it yet";
#else
  return "this processor is not x86-64";
#endif
}

}  // namespace tailor

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels, one submodule per instruction-set level; raw addresses in, nothing out.";
  m.def("missing", &tailor::missing, "Why this processor cannot run a level; empty when it can.");
  tailor::bind_baseline(m);
#if defined(__x86_64__)
  tailor::bind_avx2(m);
  tailor::bind_avx512vnni(m);
#endif
}
