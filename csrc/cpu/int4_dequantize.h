// int4_dequantize: (code - zero) * scale of an int4 weight in the canonical layout: byte i of a row
// holds k = 2 i (low nibble) and 2 i + 1 (high). Exact in float32, one rounding to the output's
// type.
#pragma once

namespace dequantize_detail {
// 32 codes of 16 bytes, in order.
inline void unpack(const std::uint8_t* data, std::uint8_t* codes) {
#if defined(__SSE2__)
  const __m128i v = _mm_loadu_si128((const __m128i*)data), mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(v, mask), high = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
  _mm_store_si128((__m128i*)codes, _mm_unpacklo_epi8(low, high));
  _mm_store_si128((__m128i*)(codes + 16), _mm_unpackhi_epi8(low, high));
#else
  for (int i = 0; i < 16; ++i) codes[2 * i] = data[i] & 15, codes[2 * i + 1] = data[i] >> 4;
#endif
}

inline F load_bytes(const std::uint8_t* p) {
#if defined(TAILOR_AVX512)
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)p)))};
#elif defined(TAILOR_AVX2)
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
#else
  return {F::V{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
#endif
}

template <typename Y>
inline void row(const std::uint8_t* data, const f16* scale, const std::uint8_t* zero,
                std::int64_t groups, std::int64_t group, Y* out) {
  alignas(64) std::uint8_t codes[32];
  for (std::int64_t g = 0; g < groups; ++g) {
    const F step = F::set(to_float(scale[g])), point = F::set(zero ? float(zero[g]) : 8.0f);
    for (std::int64_t k = g * group; k < (g + 1) * group; k += 32) {
      unpack(data + k / 2, codes);
      for (int i = 0; i < 32; i += F::width)
        ((load_bytes(codes + i) - point) * step).store(out + k + i);
    }
  }
}
}  // namespace dequantize_detail

// data: rows `data_stride` bytes apart; scale, zero (or 0: all 8): rows `groups` apart;
// out [rows, groups * group] contiguous, of dtype (not f64).
inline void int4_dequantize(address data, std::int64_t data_stride, address scale, address zero,
                            std::int64_t rows, std::int64_t groups, std::int64_t group, address out,
                            int dtype, int threads) {
  const std::int64_t width = groups * group;
  const auto run = [&](auto* y) {
    advise_huge_pages(y, rows * width * sizeof *y);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 1 << 16)
    for (std::int64_t n = 0; n < rows; ++n)
      dequantize_detail::row(
          as<const std::uint8_t>(data) + n * data_stride, as<const f16>(scale) + n * groups,
          zero ? as<const std::uint8_t>(zero) + n * groups : nullptr, groups, group, y + n * width);
  };
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return run(as<float>(out));
    case DType::bf16:
      return run(as<bf16>(out));
    case DType::f16:
      return run(as<f16>(out));
    case DType::f64:
      return;
  }
}
