// What every instruction-set level shares: headers (they must stand outside the target regions) and
// the numbers by which Python names a dtype.
#pragma once

#include <pybind11/pybind11.h>

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <thread>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tailor {

// The same numbers stand in tailor_engine/ops/_check.py.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bf16 x) {
  const std::uint32_t wide = std::uint32_t(x.bits) << 16;
  float r;
  std::memcpy(&r, &wide, 4);
  return r;
}
// Exact for every half-precision value: subnormals are scaled by 2^-24, infinities and NaN pass.
inline float to_float(f16 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31,
                      mantissa = x.bits & 0x3ff;
  if (exponent == 0) {
    const float tiny = float(mantissa) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
  const std::uint32_t wide =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float r;
  std::memcpy(&r, &wide, 4);
  return r;
}

// The nearest value that a kernel can store, ties to even; NaN stays NaN.
template <typename T>
inline T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {std::uint16_t(bits >> 16 | 0x40)};
    return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, f16>) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint16_t sign = std::uint16_t(bits >> 16 & 0x8000);
    const float size = std::abs(x);
    if (!(size < 65520.0f)) return {std::uint16_t(sign | (x != x ? 0x7e00 : 0x7c00))};
    if (size < 0x1p-14f) {  // subnormal: the sum's last place is 2^-24, so the addition rounds
      const float shifted = size + 0.5f;
      std::memcpy(&bits, &shifted, 4);
      return {std::uint16_t(sign | (bits - 0x3f000000u))};
    }
    bits = (bits & 0x7fffffff) - (112u << 23);
    return {std::uint16_t(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
  } else {
    static_assert(std::is_same_v<T, float>);
    return x;
  }
}

// Python passes addresses as integers; zero stands for an absent optional tensor.
using address = std::uintptr_t;
template <typename T>
inline T* as(address a) {
  return reinterpret_cast<T*>(a);
}

// Asks for 2 MB pages under memory that is written for the first time next: 113 MB of a head's
// gradient then take 10 ms instead of 60. Only advice, so nothing to check.
inline void advise_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = 2 << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace tailor
