// Exact sums of int8 products at AVX2, where no instruction multiplies bytes into int32: the tile
// of int8_linear for three rows and more.
//
// vpmaddubsw takes the weight as w + 128 and sums two products into a lane of 16 bits, vpmaddwd
// with ones widens. Both wait for the multiplier's two ports, so two products share a widening:
// those of an octet, eight k of a row. The lanes then hold four products each, of k 0, 1, 4, 5 and
// of k 2, 3, 6, 7, and whether these fit is a matter of the activations alone:
//   neighbours sum to 128 at most, or vpmaddubsw could saturate (255 * 128 = 32,640 < 32,768);
//   the sizes of a lane's four codes sum to 255 at most, so that their products with w fit. The sum
//   with w + 128 may overflow on the way: the octet's `offset` takes -128 * (its codes) out again.
// Four codes that break a rule are halved, and a remainder multiplies what they lost: 6 % of the
// fours of a normally distributed row at K = 576, 2 % at 4096, fewer where a row has outliers, as
// in a language model. Uniform codes would be the worst that is likely: 60 %, at half the speed.
// The inner loop runs at 146 GMAC/s on Zen 5, one thread. A widening each product is bound by 128;
// operands of 16 bits, and |w| times x with the sign of w, which need no rules, reach 114.
#pragma once

#if defined(TAILOR_AVX2) && !defined(TAILOR_AVX512)
namespace quantized {
// -128 * the codes of both lanes of an octet, in each of its two words of 32 bits.
inline __m256i offsets_of(__m256i codes) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes),
                lanes = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0xb1));
  return _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), lanes), 7);
}

// All ones for each four codes that keep the rules.
inline __m256i regular(__m256i codes) {
  const __m256i ones = _mm256_set1_epi8(1);
  const __m256i pairs = _mm256_abs_epi16(_mm256_maddubs_epi16(ones, codes)),
                sizes = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), ones),
                lanes = _mm256_add_epi16(sizes, _mm256_shuffle_epi32(sizes, 0xb1));
  const __m256i broken = _mm256_or_si256(_mm256_cmpgt_epi16(pairs, _mm256_set1_epi16(128)),
                                         _mm256_cmpgt_epi16(lanes, _mm256_set1_epi16(255)));
  return _mm256_cmpeq_epi32(broken, _mm256_setzero_si256());
}

// Half of each code, rounded to zero.
inline __m256i halved(__m256i codes) {
  const __m256i size =
      _mm256_and_si256(_mm256_srli_epi16(_mm256_abs_epi8(codes), 1), _mm256_set1_epi8(127));
  return _mm256_sign_epi8(size, codes);
}

inline __m256i in_order(__m256i words, int a, int b, int c, int d, int e, int f, int g, int h) {
  return _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(a, b, c, d, e, f, g, h));
}

// Writes a row's codes as octets and remainders; its sum becomes -128 * the remainders.
inline void write_octets(const Activations& a, std::int64_t row) {
  const std::int8_t* from = a.codes + row * a.stride;
  Octet* octet = a.octets + row * a.stride / 8;
  Remainder* const remainders = a.remainders + row * a.stride / 4;
  std::int32_t count = 0, sum = 0;
  for (std::int64_t k = 0; k < a.stride; k += 32) {
    const __m256i codes = _mm256_loadu_si256((const __m256i*)(from + k)), fine = regular(codes);
    const __m256i kept = _mm256_blendv_epi8(halved(codes), codes, fine);
    const __m256i offsets = offsets_of(kept);
    _mm256_storeu_si256((__m256i*)octet,
                        _mm256_blend_epi32(in_order(kept, 0, 1, 0, 2, 3, 0, 4, 5),
                                           in_order(offsets, 0, 0, 0, 0, 0, 2, 0, 0), 0b00100100));
    const __m256i last = _mm256_blend_epi32(in_order(kept, 0, 6, 7, 0, 0, 0, 0, 0),
                                            in_order(offsets, 4, 0, 0, 6, 0, 0, 0, 0), 0b1001);
    _mm_storeu_si128((__m128i*)octet + 2, _mm256_castsi256_si128(last));
    octet += 4;
    int broken = ~_mm256_movemask_ps(_mm256_castsi256_ps(fine)) & 255;
    if (!broken) continue;
    alignas(32) std::int8_t lost[32];
    _mm256_store_si256((__m256i*)lost, _mm256_sub_epi8(codes, kept));
    for (; broken; broken &= broken - 1) {
      const int four = __builtin_ctz(unsigned(broken));
      Remainder& remainder = remainders[count++];
      remainder.four = std::int32_t(k / 4 + four);
      std::memcpy(remainder.codes, lost + 4 * four, 4);
      for (const std::int8_t code : remainder.codes) sum -= 128 * code;
    }
  }
  a.sums[row] = sum;
  a.remainder_counts[row] = count;
}

// As an intrinsic, GCC 12 copies every sum through another register.
inline __m256i plus(__m256i sum, __m256i x) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
  return sum;
}

// Adds the products of R rows from k on with `count` octets of a weight to the sums [R][16]. The
// weight stands there as w + 128 if kUnsigned. Fetches from `ahead` on, if not null.
template <int R, bool kUnsigned>
[[gnu::noinline]] void add_octets(const Activations& a, std::int64_t row, std::int64_t k,
                                  const std::int8_t* weight, std::int64_t count,
                                  const std::int8_t* ahead, float* sums) {
  const __m256i top = _mm256_set1_epi8(char(0x80)), ones = _mm256_set1_epi16(1);
  const std::int64_t stride = a.stride / 8;
  const Octet* x = a.octets + row * stride + k / 8;
  __m256i acc[R][2];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c)
      acc[r][c] = _mm256_load_si256((const __m256i*)(sums + 16 * r + 8 * c));
  for (std::int64_t i = 0; i < count; ++i, ++x, weight += 128) {
    __m256i u[4];
    for (int j = 0; j < 4; ++j) {
      u[j] = _mm256_loadu_si256((const __m256i*)(weight + 32 * j));
      if (!kUnsigned) u[j] = _mm256_xor_si256(u[j], top);
    }
    if (!kUnsigned && ahead) {
      __builtin_prefetch(ahead + 128 * i, 0, 2);
      __builtin_prefetch(ahead + 128 * i + 64, 0, 2);
    }
    for (int r = 0; r < R; ++r) {
      const Octet& octet = x[r * stride];
      const __m256i y0 = _mm256_set1_epi32(four(octet.codes)),
                    y1 = _mm256_set1_epi32(four(octet.codes + 4)),
                    offset = _mm256_set1_epi32(four(octet.offset));
      for (int c = 0; c < 2; ++c) {
        const __m256i p0 = _mm256_maddubs_epi16(u[c], y0), p1 = _mm256_maddubs_epi16(u[2 + c], y1);
        const __m256i lanes = _mm256_add_epi16(_mm256_add_epi16(p0, p1), offset);
        acc[r][c] = plus(acc[r][c], _mm256_madd_epi16(lanes, ones));
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) _mm256_store_si256((__m256i*)(sums + 16 * r + 8 * c), acc[r][c]);
}

// Adds the products of the remainders to the sums [R][16] of R rows, which become floats.
template <int R>
inline void finish_sums(const Activations& a, std::int64_t row, const std::int8_t* panel,
                        float* sums) {
  const __m256i top = _mm256_set1_epi8(char(0x80)), ones = _mm256_set1_epi16(1);
  for (int r = 0; r < R; ++r, ++row, sums += 16) {
    const Remainder *at = a.remainders + row * a.stride / 4, *end = at + a.remainder_counts[row];
    __m256i acc[2];
    for (int c = 0; c < 2; ++c)
      acc[c] = _mm256_add_epi32(_mm256_load_si256((const __m256i*)(sums + 8 * c)),
                                _mm256_set1_epi32(a.sums[row]));
    for (; at < end; ++at) {
      const __m256i y = _mm256_set1_epi32(four(at->codes));
      for (int c = 0; c < 2; ++c) {
        const auto* lanes = (const __m256i*)(panel + 64 * std::int64_t(at->four) + 32 * c);
        const __m256i u = _mm256_xor_si256(_mm256_loadu_si256(lanes), top);
        acc[c] = plus(acc[c], _mm256_madd_epi16(_mm256_maddubs_epi16(u, y), ones));
      }
    }
    for (int c = 0; c < 2; ++c) _mm256_store_ps(sums + 8 * c, _mm256_cvtepi32_ps(acc[c]));
  }
}
}  // namespace quantized
#endif
