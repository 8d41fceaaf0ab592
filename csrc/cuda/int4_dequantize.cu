// int4_dequantize: (code - zero) * scale of an int4 weight in the canonical layout.
//
// Bound by memory, half a byte read and two or four written a value. A thread loads 16 bytes, which
// hold 32 codes; the values of a warp then go out in rounds of 16 bytes a thread, neighbours beside
// neighbours. Between the two lies a shuffle: in round s lane l writes unit u = 32 s + l, whose
// codes were loaded by lane u / (units of a load).
#include "common.cuh"

namespace tailor {
namespace {

constexpr int kThreads = 256;
constexpr int kLoaded = 32;  // codes of one 16-byte load

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize(const uint4* __restrict__ data, const __half* __restrict__ scale,
               const std::uint8_t* __restrict__ zero, std::int64_t loads, int group_shift,
               Chunk<T>* __restrict__ out) {
  constexpr int kSize = Chunk<T>::size;     // codes of one 16-byte store
  constexpr int kRounds = kLoaded / kSize;  // stores for a load
  constexpr int kUnitsOfWord = 8 / kSize;   // units in one of the four 32-bit words of a load
  const int lane = threadIdx.x % 32;
  const std::int64_t first = std::int64_t(blockIdx.x) * kThreads + threadIdx.x - lane;
  if (first >= loads) return;  // the whole warp
  const bool mine = first + lane < loads;
  const uint4 loaded = mine ? __ldg(data + first + lane) : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int s = 0; s < kRounds; ++s) {
    const int unit = 32 * s + lane, word = unit / kUnitsOfWord, source = word / 4;
    const unsigned x = __shfl_sync(~0u, loaded.x, source), y = __shfl_sync(~0u, loaded.y, source),
                   z = __shfl_sync(~0u, loaded.z, source), w = __shfl_sync(~0u, loaded.w, source);
    if (first + source >= loads) continue;
    const unsigned low = word & 1 ? y : x, high = word & 1 ? w : z;
    const unsigned codes = (word & 2 ? high : low) >> (unit % kUnitsOfWord * 4 * kSize);
    const std::int64_t group = (first * kLoaded + unit * kSize) >> group_shift;
    const float step = __half2float(__ldg(scale + group));
    const int point = zero ? __ldg(zero + group) : 8;
    Chunk<T> values;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      values.values[i] = from_float<T>(float(int(codes >> (4 * i) & 15) - point) * step);
    out[first * kRounds + unit] = values;
  }
}

// The same of the "cpu" panels of ops/_layout.py, for a dense product of many tokens: 16 bytes are
// 4 features by 8 k, so the 8 neighbours along K of a warp write 128 bytes of each feature's row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_panels(const uint4* __restrict__ data, const __half* __restrict__ scale,
                      const std::uint8_t* __restrict__ zero, int features, int eights,
                      int group_shift, T* __restrict__ out) {
  const std::int64_t load = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int panel = int(load / 4 / eights), eight = int(load / 4 % eights);
  const int first = int(load % 4) * 4, present = min(16, features - 16 * panel);
  if (first >= present) return;
  const uint4 loaded = __ldg(data + load);
  const int groups = 8 * eights >> group_shift;
  const std::int64_t group =
      std::int64_t(panel) * 16 * groups + std::int64_t(8 * eight >> group_shift) * present;
  for (int f = 0; f < 4 && first + f < present; ++f) {
    const unsigned codes = f == 0 ? loaded.x : f == 1 ? loaded.y : f == 2 ? loaded.z : loaded.w;
    const float step = __half2float(__ldg(scale + group + first + f));
    const int point = zero ? __ldg(zero + group + first + f) : 8;
    constexpr int kSize = Chunk<T>::size;
    Chunk<T> values[8 / kSize];
    for (int k = 0; k < 8; ++k)  // byte k % 4 holds k in its low nibble, k + 4 in its high one
      values[k / kSize].values[k % kSize] =
          from_float<T>(float(int(codes >> (k % 4 * 8 + k / 4 * 4) & 15) - point) * step);
    const std::int64_t row = std::int64_t(16) * panel + first + f;
    auto* to = reinterpret_cast<Chunk<T>*>(out + (row * eights + eight) * 8);
    for (int i = 0; i < 8 / kSize; ++i) to[i] = values[i];
  }
}

template <typename T>
void launch_panels(address data, address scale, address zero, int features, int width,
                   int group_shift, address out, address stream) {
  const std::int64_t loads = std::int64_t((features + 15) / 16) * (width / 8) * 4;
  launch("int4_dequantize", dequantize_panels<T>,
         Launch{(loads + kThreads - 1) / kThreads, kThreads, stream},
         reinterpret_cast<const uint4*>(data), reinterpret_cast<const __half*>(scale),
         reinterpret_cast<const std::uint8_t*>(zero), features, width / 8, group_shift,
         reinterpret_cast<T*>(out));
}

template <typename T>
void launch_dequantize(address data, address scale, address zero, std::int64_t values,
                       int group_shift, address out, address stream) {
  const LaunchConfig config = int4_dequantize_config(values);
  launch("int4_dequantize", dequantize<T>, Launch{config.blocks, config.threads, stream},
         reinterpret_cast<const uint4*>(data), reinterpret_cast<const __half*>(scale),
         reinterpret_cast<const std::uint8_t*>(zero), values / kLoaded, group_shift,
         reinterpret_cast<Chunk<T>*>(out));
}

}  // namespace

LaunchConfig int4_dequantize_config(std::int64_t values) {
  const std::int64_t loads = values / kLoaded;
  return {(loads + kThreads - 1) / kThreads, kThreads};
}

// data, scale, zero (or 0: all 8) contiguous, data and out at multiples of 16 bytes; values a
// multiple of 32; group 32, 64 or 128; dtype f32, bf16 or f16.
void int4_dequantize(address data, address scale, address zero, std::int64_t values, int group,
                     address out, int dtype, address stream) {
  if (values == 0) return;
  const int shift = group == 32 ? 5 : group == 64 ? 6 : 7;
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      launch_dequantize<float>(data, scale, zero, values, shift, out, stream);
      break;
    case DType::bf16:
      launch_dequantize<__nv_bfloat16>(data, scale, zero, values, shift, out, stream);
      break;
    case DType::f16:
      launch_dequantize<__half>(data, scale, zero, values, shift, out, stream);
      break;
    case DType::f64:
      throw CudaError("int4_dequantize: no float64 on the GPU");
  }
}

// The same with data, scale and zero in panels; out [features, width], contiguous.
void int4_dequantize_panels(address data, address scale, address zero, int features, int width,
                            int group, address out, int dtype, address stream) {
  const int shift = group == 32 ? 5 : group == 64 ? 6 : 7;
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return launch_panels<float>(data, scale, zero, features, width, shift, out, stream);
    case DType::bf16:
      return launch_panels<__nv_bfloat16>(data, scale, zero, features, width, shift, out, stream);
    case DType::f16:
      return launch_panels<__half>(data, scale, zero, features, width, shift, out, stream);
    case DType::f64:
      throw CudaError("int4_dequantize: no float64 on the GPU");
  }
}

}  // namespace tailor
