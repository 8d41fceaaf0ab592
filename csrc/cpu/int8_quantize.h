// int8_quantize: symmetric codes of each row of a float32 weight [N, K], one scale a row.
//
// The rules are those of tailor_engine/ops/_quantize.py, operation by operation in float32, so that
// codes and scales equal the reference bit for bit. Two reads of a row; the compiler vectorises
// both loops (no fast-math: division and rounding are IEEE's).
#pragma once

namespace quantize_detail {
struct Range {
  float low, high;
};

// The extremes of n values, times the clip ratio where there is one.
inline Range extremes(const float* x, std::int64_t n, const float* clip) {
  Range r = {x[0], x[0]};
  std::int64_t k = 0;
  if (n >= F::width) {
    F low = F::load(x), high = low;
    for (k = F::width; k + F::width <= n; k += F::width) {
      low = min(low, F::load(x + k));
      high = max(high, F::load(x + k));
    }
    r = {-(F::zero() - low).maximum(), high.maximum()};
  }
  for (; k < n; ++k) r = {std::min(r.low, x[k]), std::max(r.high, x[k])};
  if (clip) r.low *= *clip, r.high *= *clip;
  return r;
}

// Clamping before rounding gives the same integers, and then adding and subtracting 1.5 x 2^23
// rounds half to even, which the compiler can vectorise (nearbyint it calls one by one).
inline float code(float x, float scale, float zero, float floor, float ceiling) {
  const float v = std::min(std::max(x / scale, floor - zero), ceiling - zero);
  return ((v + 12582912.0f) - 12582912.0f) + zero;
}
}  // namespace quantize_detail

inline void int8_quantize(address weight, std::int64_t rows, std::int64_t width, address clip,
                          address data, address scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t n = 0; n < rows; ++n) {
    const float* x = as<const float>(weight) + n * width;
    const float* ratio = clip ? as<const float>(clip) + n : nullptr;
    const quantize_detail::Range r = quantize_detail::extremes(x, width, ratio);
    float s = std::max(-r.low, r.high) / 127.0f;
    if (s == 0.0f) s = 1.0f;
    std::int8_t* out = as<std::int8_t>(data) + n * width;
    for (std::int64_t k = 0; k < width; ++k)
      out[k] = std::int8_t(quantize_detail::code(x[k], s, 0.0f, -127.0f, 127.0f));
    as<float>(scale)[n] = s;
  }
}
