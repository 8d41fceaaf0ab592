// What the kernels share: conversion on store, and one clear message when a launch is refused.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

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

// 16 bytes of values: what one load or store of a thread moves.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

// Asks for the state of the last launch; without a driver that is where CUDA first speaks up.
inline void check_launch(const char* op) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return;
  throw CudaError(std::string(op) + ": the GPU launch was refused: " + cudaGetErrorString(status) +
                  " (nvidia-smi shows driver and GPU)");
}

}  // namespace tailor
