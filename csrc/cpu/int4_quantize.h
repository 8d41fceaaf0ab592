// int4_quantize: unsigned codes of groups of a weight [N, K], two in a byte (even k low), with a
// float16 scale and a zero point a group; the rules and the loop stand in int8_quantize.h.
#pragma once

namespace quantize_detail {
// 32 codes, each in a byte, to 16 bytes.
inline void pack_nibbles(const std::uint8_t* codes, std::uint8_t* out) {
#if defined(__SSE2__)
  __m128i half[2];
  for (int i = 0; i < 2; ++i) {
    const __m128i pairs = _mm_loadu_si128((const __m128i*)(codes + 16 * i));
    half[i] = _mm_and_si128(_mm_or_si128(pairs, _mm_srli_epi16(pairs, 4)), _mm_set1_epi16(255));
  }
  _mm_storeu_si128((__m128i*)out, _mm_packus_epi16(half[0], half[1]));
#else
  for (int i = 0; i < 16; ++i) out[i] = std::uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
#endif
}

template <typename X>
inline void write_int4(const X* x, std::int64_t group, float scale, float zero, std::uint8_t* out) {
  const F step = F::set(scale), floor = F::set(-zero), ceiling = F::set(15.0f - zero);
  for (std::int64_t k = 0; k < group; k += 32) {
    std::int8_t signed_codes[32];
    std::uint8_t codes[32];
    for (int i = 0; i < 32; i += F::width)
      quantized::store_codes(scaled(F::load(x + k + i), step, floor, ceiling), signed_codes + i);
    for (int i = 0; i < 32; ++i) codes[i] = std::uint8_t(signed_codes[i] + std::int8_t(zero));
    pack_nibbles(codes, out + k / 2);
  }
}
}  // namespace quantize_detail

inline void int4_quantize(address weight, int dtype, std::int64_t rows, std::int64_t width,
                          std::int64_t group, bool symmetric, address clip, address data,
                          address scale, address zero, int threads) {
  using namespace quantize_detail;
  advise_huge_pages(as<void>(data), rows * width / 2);
  with_float(dtype, weight, [&](const auto* x) {
    each_group(x, rows * (width / group), group, as<const float>(clip), {4, symmetric}, threads,
               [&](const auto* values, std::int64_t n, int i, const Batch& b) {
                 write_int4(values, group, b.scale[i], b.zero[i],
                            as<std::uint8_t>(data) + n * group / 2);
                 as<f16>(scale)[n] = b.half[i];
                 as<std::uint8_t>(zero)[n] = std::uint8_t(b.zero[i]);
               });
  });
}
