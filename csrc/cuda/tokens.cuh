// Tokens in int8 with a scale each, as the products of few tokens read them; one block a token.
#pragma once

#include "common.cuh"

namespace tailor {

constexpr int kTokenThreads = 512;

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

template <typename T>
__device__ inline Four<T> load_four(const T* row, int k, int width, bool aligned) {
  if (aligned && k + 4 <= width) return *reinterpret_cast<const Four<T>*>(row + k);
  Four<T> four;
  for (int i = 0; i < 4; ++i) four.values[i] = k + i < width ? row[k + i] : from_float<T>(0);
  return four;
}

// The rounding of activation_codes in ops/_quantize.py: absmax / 127, one division a value, half to
// even. kInterleaved: the words of 32 values go 0, 4, 1, 5, ... (8-bit weights), else in order.
// K is padded with zeros.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kTokenThreads)
    quantize_tokens(const T* x, int width, int padded, bool aligned, float* scale,
                    std::uint32_t* codes) {
  let_next_kernel_begin();
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* row = x + std::int64_t(token) * width;
  float largest = 0;
  for (int k = 4 * threadIdx.x; k < width; k += 4 * kTokenThreads) {
    const Four<T> four = load_four(row, k, width, aligned);
    for (const T& value : four.values) largest = fmaxf(largest, fabsf(to_float(value)));
  }
  for (int distance = 16; distance; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  float* of_warps = reinterpret_cast<float*>(shared_memory());
  if (lane == 0) of_warps[warp] = largest;
  __syncthreads();
  for (int i = 0; i < kTokenThreads / 32; ++i) largest = fmaxf(largest, of_warps[i]);
  const float step = largest == 0 ? 1 : largest / 127;
  if (threadIdx.x == 0) scale[token] = step;
  for (int k = 4 * threadIdx.x; k < padded; k += 4 * kTokenThreads) {
    const Four<T> four = load_four(row, k, width, aligned);
    std::uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const int code = int(fminf(fmaxf(rintf(to_float(four.values[i]) / step), -127), 127));
      word |= std::uint32_t(code & 255) << (8 * i);
    }
    const int place = k % 32 / 4;
    const int to = kInterleaved ? place % 4 * 2 + place / 4 : place;
    codes[(std::int64_t(token) * padded + k) / 32 * 8 + to] = word;
  }
}

template <typename T, bool kInterleaved>
void launch_tokens(const char* op, const Linear& linear, address stream) {
  const int padded =
      (linear.width + kSmallBatchPadding - 1) / kSmallBatchPadding * kSmallBatchPadding;
  const bool aligned = linear.width % 4 == 0 && linear.x % sizeof(Four<T>) == 0;
  Launch shape{linear.rows, kTokenThreads, stream};
  shape.shared_bytes = kTokenThreads / 32 * sizeof(float);
  launch(op, quantize_tokens<T, kInterleaved>, shape, reinterpret_cast<const T*>(linear.x),
         linear.width, padded, aligned, reinterpret_cast<float*>(linear.workspace),
         reinterpret_cast<std::uint32_t*>(linear.workspace + kSmallBatchHeader));
}

// Writes scales and codes of the tokens into the workspace.
template <bool kInterleaved>
void quantize_tokens_of(const char* op, const Linear& linear, address stream) {
  switch (static_cast<DType>(linear.dtype)) {
    case DType::f32:
      return launch_tokens<float, kInterleaved>(op, linear, stream);
    case DType::bf16:
      return launch_tokens<__nv_bfloat16, kInterleaved>(op, linear, stream);
    case DType::f16:
      return launch_tokens<__half, kInterleaved>(op, linear, stream);
    case DType::f64:
      throw CudaError(std::string(op) + ": no float64 on the GPU");
  }
}

}  // namespace tailor
