// int4_linear: y[T, N] = token scale * sum over groups of scale * (int8 x)(u4 code - zero)^T +
// bias.
//
// The codes stay unsigned; the zero point enters once a group as -zero * (sum of the activations).
// A vector holds eight k of a panel: its low nibbles are k 0..3, its high ones k 4..7.
//   avx512vnni: vpdpbusd, two for a vector and row.
//   avx2: vpmaddubsw, summed in int16 over 32 k, then one vpmaddwd with ones to int32. No overflow:
//     8 sums of 2 products are at most 8 * 2 * 15 * 127 = 30,480 < 32,768.
//   baseline: the same sums with plain vectors, bytes split into even and odd ones.
#pragma once

namespace int4_detail {
using namespace quantized;

// How far ahead one or two rows fetch the weight, in bytes, and its scales in step with it: 80 % of
// the read bandwidth on Zen 5, 68 % at half of it, 55 % where nothing is fetched.
constexpr int kAhead = 4096;

struct Kernel {
#if defined(TAILOR_AVX512)
  static constexpr int kRows = 6, kPanels = 2;  // 12 integer and 12 float sums in 32 registers
  static constexpr bool kHalves = false;
#elif defined(TAILOR_AVX2)
  static constexpr int kRows = 4, kPanels = 1;
  static constexpr bool kHalves = false;
#else
  static constexpr int kRows = 2, kPanels = 1;
  static constexpr bool kHalves = true;
#endif
  const std::uint8_t* weight;  // [panels][width / 8][16][4]
  const std::uint16_t* scale;  // float16, panel by panel [groups][16 or, in the last, fewer]
  const std::uint8_t* zero;    // in the same order, or null: 8
  std::int64_t features, width, groups;

  int factor() const { return zero ? -1 : -8; }

  // The scales (or zero points) of one group of a panel; a narrow last panel goes through `lanes`.
  template <typename T>
  inline const T* of_group(const T* values, std::int64_t panel, std::int64_t group,
                           T* lanes) const {
    const std::int64_t left = features - panel * 16;
    const T* start = values + panel * groups * 16;
    if (left >= 16) return start + group * 16;
    std::memcpy(lanes, start + group * left, std::size_t(left) * sizeof(T));
    return lanes;
  }

#if defined(TAILOR_AVX512)
  // The sums of R rows with C panels from `panel` on: [R][C] vectors of `out`, 32 floats a row.
  template <int R, int C>
  inline void panels(const Activations& a, std::int64_t row, std::int64_t panel, float* out) const {
    const std::int64_t panel_bytes = width * 8, size = width / groups;
    const std::uint8_t* w = weight + panel * panel_bytes;
    const std::int8_t* x = a.codes + row * a.stride;
    const __m512i mask = _mm512_set1_epi8(15);
    constexpr int U = R * C <= 8 ? 2 : 1;  // apart for low and high nibbles: more chains
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    std::uint16_t scale_lanes[16] = {};
    std::uint8_t zero_lanes[16] = {};
    for (std::int64_t g = 0; g < groups; ++g) {
      __m512i acc[U][R][C];
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
          acc[0][r][c] = _mm512_set1_epi32(a.sums[(row + r) * groups + g]);
          if (U == 2) acc[U - 1][r][c] = _mm512_setzero_si512();
        }
      if (zero) {
        for (int c = 0; c < C; ++c) {
          const std::uint8_t* z = of_group(zero, panel + c, g, zero_lanes);
          const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)z));
          for (int r = 0; r < R; ++r) acc[0][r][c] = _mm512_mullo_epi32(wide, acc[0][r][c]);
        }
      }
      for (std::int64_t k = g * size; k < (g + 1) * size; k += 8) {
        __m512i low[C], high[C];
        for (int c = 0; c < C; ++c) {
          const std::uint8_t* eight = w + c * panel_bytes + 8 * k;
          const __m512i v = _mm512_loadu_si512(eight);
          if (C == 1) _mm_prefetch((const char*)(eight + kAhead), _MM_HINT_T0);
          low[c] = _mm512_and_si512(v, mask);
          high[c] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
        }
        for (int r = 0; r < R; ++r) {
          const std::int8_t* eight = x + r * a.stride + k;
          const __m512i y0 = _mm512_set1_epi32(four(eight)),
                        y1 = _mm512_set1_epi32(four(eight + 4));
          for (int c = 0; c < C; ++c) {
            acc[0][r][c] = dot(acc[0][r][c], low[c], y0);
            acc[U - 1][r][c] = dot(acc[U - 1][r][c], high[c], y1);
          }
        }
      }
      for (int c = 0; c < C; ++c) {
        const std::uint16_t* d = of_group(scale, panel + c, g, scale_lanes);
        if (C == 1) _mm_prefetch((const char*)(d + kAhead / 8), _MM_HINT_T0);
        const __m512 s = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)d));
        for (int r = 0; r < R; ++r) {
          __m512i sum = acc[0][r][c];
          if (U == 2) sum = _mm512_add_epi32(sum, acc[U - 1][r][c]);
          sums[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, sums[r][c]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) _mm512_store_ps(out + 32 * r + 16 * c, sums[r][c]);
  }

  template <int R>
  inline void tile(const Activations& a, std::int64_t row, std::int64_t panel, float* out) const {
    const bool pair = (panel + 1) * 16 < features;
    // Few rows wait for the weight: one panel after the other is one stream through memory.
    if (R > 2 && pair) return panels<R, 2>(a, row, panel, out);
    panels<R, 1>(a, row, panel, out);
    if (pair) panels<R, 1>(a, row, panel + 1, out + 16);
  }
#elif defined(TAILOR_AVX2)
  template <int R>
  inline void tile(const Activations& a, std::int64_t row, std::int64_t panel, float* out) const {
    const std::int64_t size = width / groups;
    const std::uint8_t* w = weight + panel * width * 8;
    const std::int8_t* x = a.codes + row * a.stride;
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    std::uint16_t scale_lanes[16] = {};
    std::uint8_t zero_lanes[16] = {};
    std::memset(out, 0, R * 16 * sizeof(float));
    for (std::int64_t g = 0; g < groups; ++g) {
      alignas(32) std::int32_t acc[R][16];
      const std::uint8_t* z = zero ? of_group(zero, panel, g, zero_lanes) : nullptr;
      for (int r = 0; r < R; ++r) {
        const __m256i sum = _mm256_set1_epi32(a.sums[(row + r) * groups + g]);
        for (int c = 0; c < 2; ++c) {
          const __m256i start =
              z ? _mm256_mullo_epi32(
                      _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(z + 8 * c))), sum)
                : sum;
          _mm256_store_si256((__m256i*)(acc[r] + 8 * c), start);
        }
      }
      for (std::int64_t k = g * size; k < (g + 1) * size; k += 32) {
        __m256i part[R][2];
        for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const std::uint8_t* eight = w + 8 * (k + 8 * j);
          const __m256i v0 = _mm256_loadu_si256((const __m256i*)eight),
                        v1 = _mm256_loadu_si256((const __m256i*)(eight + 32));
          if (R <= 2) _mm_prefetch((const char*)(eight + kAhead), _MM_HINT_T0);
          for (int half = 0; half < 2; ++half) {
            const __m256i u0 = _mm256_and_si256(half ? _mm256_srli_epi16(v0, 4) : v0, mask);
            const __m256i u1 = _mm256_and_si256(half ? _mm256_srli_epi16(v1, 4) : v1, mask);
            for (int r = 0; r < R; ++r) {
              const std::int8_t* at = x + r * a.stride + k + 8 * j + 4 * half;
              const __m256i y = _mm256_set1_epi32(four(at));
              part[r][0] = _mm256_add_epi16(part[r][0], _mm256_maddubs_epi16(u0, y));
              part[r][1] = _mm256_add_epi16(part[r][1], _mm256_maddubs_epi16(u1, y));
              // GCC 12 otherwise defers the sums and spills every product: 26 instead of 39
              // products a cycle.
              asm("" : "+x"(part[r][0]), "+x"(part[r][1]));
            }
          }
        }
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < 2; ++c) {
            __m256i* at = (__m256i*)(acc[r] + 8 * c);
            _mm256_store_si256(
                at, _mm256_add_epi32(_mm256_load_si256(at), _mm256_madd_epi16(part[r][c], ones)));
          }
      }
      const std::uint16_t* d = of_group(scale, panel, g, scale_lanes);
      if (R <= 2) _mm_prefetch((const char*)(d + kAhead / 8), _MM_HINT_T0);
      for (int c = 0; c < 2; ++c) {
        const __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(d + 8 * c)));
        for (int r = 0; r < R; ++r) {
          float* at = out + 16 * r + 8 * c;
          const __m256 sum =
              _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i*)(acc[r] + 8 * c)));
          _mm256_store_ps(at, _mm256_fmadd_ps(sum, s, _mm256_load_ps(at)));
        }
      }
    }
  }
#else
  template <int R>
  inline void tile(const Activations& a, std::int64_t row, std::int64_t panel, float* out) const {
    const std::int64_t size = width / groups;
    const std::uint8_t* w = weight + panel * width * 8;
    std::uint16_t scale_lanes[16] = {};
    std::uint8_t zero_lanes[16] = {};
    std::memset(out, 0, R * 16 * sizeof(float));
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::uint16_t* d = of_group(scale, panel, g, scale_lanes);
      const std::uint8_t* z = zero ? of_group(zero, panel, g, zero_lanes) : nullptr;
      Longs acc[R][4] = {};
      for (std::int64_t k = g * size; k < (g + 1) * size; k += 32) {
        Words part[R][4] = {};
        for (int j = 0; j < 4; ++j)
          for (int c = 0; c < 4; ++c) {
            const Words v = load_words(w + 8 * (k + 8 * j) + 16 * c);
            const Words low = v & 0x0f0f, high = v >> 4 & 0x0f0f;
            for (int r = 0; r < R; ++r) {
              const std::int16_t* x = a.halves + (row + r) * a.stride + k + 8 * j;
              part[r][c] += (low & 0xff) * repeat(x) + (low >> 8) * repeat(x + 2) +
                            (high & 0xff) * repeat(x + 4) + (high >> 8) * repeat(x + 6);
            }
          }
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < 4; ++c) acc[r][c] += widen(part[r][c]);
      }
      for (int r = 0; r < R; ++r) {
        const std::int32_t sum = a.sums[(row + r) * groups + g];
        for (int n = 0; n < 16; ++n)
          out[16 * r + n] +=
              float(acc[r][n / 4][n % 4] + (z ? z[n] : 1) * sum) * to_float(f16{d[n]});
      }
    }
  }
#endif
};
}  // namespace int4_detail

// x [rows, width] with rows `x_stride` apart; weight [ceil(features / 16), width / 8, 16, 4], scale
// and zero (or 0: all 8) [features, groups] in panel order; bias (or zero) float;
// y [rows, features] contiguous, of x's dtype (not f64).
inline void int4_linear(address x, int dtype, std::int64_t rows, std::int64_t width,
                        std::int64_t x_stride, address weight, address scale, address zero,
                        std::int64_t groups, address bias, address y, std::int64_t features,
                        address workspace, int threads) {
  quantized::Stack stack;
  const quantized::Activations a = quantized::carve(workspace, stack, rows, width, groups);
  const int4_detail::Kernel kernel{as<const std::uint8_t>(weight),
                                   as<const std::uint16_t>(scale),
                                   as<const std::uint8_t>(zero),
                                   features,
                                   width,
                                   groups};
  quantized::dispatch(x, dtype, x_stride, a, kernel, 0, bias, y, features, threads);
}
