// What the kernels share. Each primitive of the device stands behind a function of device.cuh;
// tests/cuda_emulate.h has the same functions on the host, so that tests run the kernels' own
// source, index by index, on a machine without a GPU.
#pragma once

#include <type_traits>

#ifdef TAILOR_EMULATE
#include "cuda_emulate.h"
#else
#include "device.cuh"
#endif

#include "ops.h"

namespace tailor {

template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

template <typename T>
__device__ inline float to_float(T x) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float(x);
  else
    return x;
}

// Value i of an array whose dtype is known at run time only: for the few values of an epilogue.
__device__ inline float load_as(DType dtype, const void* values, std::int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(values)[i];
  if (dtype == DType::f16) return to_float(static_cast<const __half*>(values)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(values)[i]);
}

__device__ inline void store_as(DType dtype, void* values, std::int64_t i, float x) {
  if (dtype == DType::f32)
    static_cast<float*>(values)[i] = x;
  else if (dtype == DType::f16)
    static_cast<__half*>(values)[i] = from_float<__half>(x);
  else
    static_cast<__nv_bfloat16*>(values)[i] = from_float<__nv_bfloat16>(x);
}

// 16 bytes of values: what one load or store of a thread moves.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

}  // namespace tailor
