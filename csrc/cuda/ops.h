// What bindings.cpp sees of the kernels: addresses, sizes and a stream as plain integers, so that
// the host compiler needs no CUDA header.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace tailor {

using address = std::uintptr_t;

// The same numbers stand in tailor_engine/ops/_check.py and csrc/cpu/prelude.h.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// A launch that the driver refused; the bindings turn it into tailor_engine.errors.TailorError.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How a kernel is launched. Computed by a pure function of the problem, beside each kernel.
struct LaunchConfig {
  std::int64_t blocks;
  int threads;
};

LaunchConfig int4_dequantize_config(std::int64_t values);
void int4_dequantize(address data, address scale, address zero, std::int64_t values, int group,
                     address out, int dtype, address stream);

}  // namespace tailor
