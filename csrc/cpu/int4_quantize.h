// int4_quantize: unsigned codes of groups of a weight [N, K], two in a byte (even k low), with a
// float16 scale and a zero point a group; the rules and the loop stand in int8_quantize.h.
#pragma once

namespace quantize_detail {
constexpr int kVectors = 32 / F::width;

// 32 numbers, rounded half to even, plus the zero point, to the nibbles of 16 bytes.
inline void pack_int4(const F* codes, int zero, std::uint8_t* out) {
#if defined(TAILOR_AVX2)
  __m256i bytes;  // the even one of each pair lies in the low half of a word
#if defined(TAILOR_AVX512)
  __m128i half[2];
  for (int i = 0; i < 2; ++i) half[i] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(codes[i].v));
  bytes = _mm256_set_m128i(half[1], half[0]);
#else
  __m256i words[2];
  for (int i = 0; i < 2; ++i)
    words[i] = _mm256_packs_epi32(_mm256_cvtps_epi32(codes[2 * i].v),
                                  _mm256_cvtps_epi32(codes[2 * i + 1].v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // of fours, in two halves each
  bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order);
#endif
  bytes = _mm256_add_epi8(bytes, _mm256_set1_epi8(char(zero)));
  const __m256i pairs = _mm256_or_si256(bytes, _mm256_srli_epi16(bytes, 4));
  const __m256i nibbles = _mm256_and_si256(pairs, _mm256_set1_epi16(255));
  const __m256i packed = _mm256_packus_epi16(nibbles, nibbles);
  const __m256i front = _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(front));
#else
  float lanes[32];
  for (int i = 0; i < kVectors; ++i) rounded(codes[i]).store(lanes + i * F::width);
  for (int i = 0; i < 16; ++i)
    out[i] = std::uint8_t((int(lanes[2 * i]) + zero) | (int(lanes[2 * i + 1]) + zero) << 4);
#endif
}

template <typename X>
inline void write_int4(const X* x, std::int64_t group, float scale, float zero, std::uint8_t* out) {
  const F step = F::set(scale), floor = F::set(-zero), ceiling = F::set(15.0f - zero);
  for (std::int64_t k = 0; k < group; k += 32) {
    F codes[kVectors];
    for (int i = 0; i < kVectors; ++i)
      codes[i] = scaled(F::load(x + k + i * F::width), step, floor, ceiling);
    pack_int4(codes, int(zero), out + k / 2);
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
