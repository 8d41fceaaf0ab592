// int4_quantize: unsigned codes of groups of a float32 weight [N, K], two in a byte (even k low),
// with a float16 scale and a zero point a group; the reference's rules (_quantize.py) bit for bit.
#pragma once

inline void int4_quantize(address weight, std::int64_t rows, std::int64_t width, std::int64_t group,
                          bool symmetric, address clip, address data, address scale, address zero,
                          int threads) {
  const std::int64_t groups = width / group;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t n = 0; n < rows; ++n) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const float* x = as<const float>(weight) + n * width + g * group;
      const float* ratio = clip ? as<const float>(clip) + n * groups + g : nullptr;
      quantize_detail::Range r = quantize_detail::extremes(x, group, ratio);
      float step;
      if (symmetric) {
        step = std::max(-r.low, r.high) / 7.0f;
      } else {
        r = {std::min(r.low, 0.0f), std::max(r.high, 0.0f)};  // so that 0 itself stays exact
        step = (r.high - r.low) / 15.0f;
      }
      const f16 half = from_float<f16>(std::min(step, 65504.0f));
      float s = to_float(half);
      if (s == 0.0f) s = 1.0f;
      const float z = symmetric ? 8.0f : quantize_detail::code(-r.low, s, 0.0f, 0.0f, 15.0f);
      std::uint8_t* out = as<std::uint8_t>(data) + (n * width + g * group) / 2;
      for (std::int64_t k = 0; k < group; k += 2) {
        const auto even = std::uint8_t(quantize_detail::code(x[k], s, z, 0.0f, 15.0f));
        const auto odd = std::uint8_t(quantize_detail::code(x[k + 1], s, z, 0.0f, 15.0f));
        out[k / 2] = std::uint8_t(even | odd << 4);
      }
      as<f16>(scale)[n * groups + g] = from_float<f16>(s);
      as<std::uint8_t>(zero)[n * groups + g] = std::uint8_t(z);
    }
  }
}
