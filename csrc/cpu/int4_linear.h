// int4_linear: y[T, N] = token scale * sum over groups of scale * (int8 x)(u4 code - zero)^T +
// bias.
//
// The codes stay unsigned; the zero point enters once a group as -zero * (sum of the activations).
// A vector holds eight k of a panel: its low nibbles are k 0..3, its high ones k 4..7.
//   avx512vnni: vpdpbusd, two for a vector and row. For up to four rows the high nibbles stay where
//     they are, and their sum, 16 times too large, is shifted once a group.
//   avx2: vpmaddubsw, summed in int16 over 32 k, then one vpmaddwd with ones to int32. No overflow:
//     8 sums of 2 products are at most 8 * 2 * 15 * 127 = 30,480 < 32,768.
//   baseline: the same sums with plain vectors, bytes split into even and odd ones.
#pragma once

namespace int4_detail {
using namespace quantized;

struct Kernel {
  // A copy that is unpacked once for all rows needs no mask and no shift, and leaves registers for
  // more rows. At AVX-512, where sums of groups would have to wait in memory for that, it takes 1.5
  // times as long.
#if defined(TAILOR_AVX512)
  static constexpr int kRows = 6, kPanels = 2;  // 12 integer and 12 float sums in 32 registers
  static constexpr int kUnpackedRows = 0, kUnpackedPanels = 1, kUnpackFrom = 0;
  static constexpr bool kHalves = false, kOctets = false;
#elif defined(TAILOR_AVX2)
  static constexpr int kRows = 4, kPanels = 1;
  static constexpr int kUnpackedRows = 6, kUnpackedPanels = 1, kUnpackFrom = 8;
  static constexpr bool kHalves = false, kOctets = false;
#else
  static constexpr int kRows = 2, kPanels = 1;
  static constexpr int kUnpackedRows = 0, kUnpackedPanels = 1, kUnpackFrom = 0;
  static constexpr bool kHalves = true, kOctets = false;
#endif
  static constexpr int kUnpackedBytes = 16;  // a panel's for one k
  // Groups of one float sum: 32 in a row were 2.5 times as far from float64 as torch's product.
  static constexpr int kSummed = 8;
  static bool is_last(std::int64_t group, std::int64_t end) {
    return group + 1 == end || (group + 1) % kSummed == 0;
  }
  // How far ahead one or two rows fetch the weight, in bytes, and its scales and zero points in
  // step with it: all of the read bandwidth on Zen 5 (39 GB/s), 34 at half of it, 32 at a quarter.
  static constexpr std::int64_t kAhead = 8192;
  const std::uint8_t* weight;  // [panels][width / 8][16][4]
  const std::uint16_t* scale;  // float16, panel by panel [groups][16 or, in the last, fewer]
  const std::uint8_t* zero;    // in the same order, or null: 8
  std::int64_t features, width, groups;

  int factor() const { return zero ? -1 : -8; }
  std::int64_t panel_bytes() const { return width * 8; }
  const std::uint8_t* panel(std::int64_t number) const { return weight + number * panel_bytes(); }

#if defined(TAILOR_AVX512)
  // Where the scales (or zero points) of one group of a panel stand; a narrow last panel has fewer.
  template <typename T>
  inline const T* of_group(const T* values, std::int64_t number, std::int64_t group) const {
    return values + number * groups * 16 +
           group * std::min<std::int64_t>(16, features - number * 16);
  }
  inline __mmask16 lanes_of(std::int64_t number) const {
    return __mmask16(0xffff >> std::max<std::int64_t>(0, number * 16 + 16 - features));
  }
#else
  // The scales (or zero points) of one group of a panel; a narrow last panel goes through `lanes`.
  template <typename T>
  inline const T* of_group(const T* values, std::int64_t number, std::int64_t group,
                           T* lanes) const {
    const std::int64_t left = features - number * 16;
    const T* start = values + number * groups * 16;
    if (left >= 16) return start + group * 16;
    std::memcpy(lanes, start + group * left, std::size_t(left) * sizeof(T));
    return lanes;
  }
#endif

#if defined(TAILOR_AVX512)
  static inline __m512i low_of(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static inline __m512i high_of(__m512i v) { return low_of(_mm512_srli_epi16(v, 4)); }

  // Where the sums of a group begin: the share of the zero point.
  template <bool kZero, int R, int C>
  inline void begin_group(const Activations& a, std::int64_t row, std::int64_t first,
                          std::int64_t group, __m512i (&sums)[R][C]) const {
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        sums[r][c] = _mm512_set1_epi32(a.sums[(row + r) * groups + group]);
    if (!kZero) return;
    for (int c = 0; c < C; ++c) {
      const __m512i wide = _mm512_cvtepu8_epi32(
          _mm_maskz_loadu_epi8(lanes_of(first + c), of_group(zero, first + c, group)));
      for (int r = 0; r < R; ++r) sums[r][c] = _mm512_mullo_epi32(wide, sums[r][c]);
    }
  }

  // Out of line, and without a branch for the zero points: GCC 12 otherwise keeps half of the sums
  // on the stack, 1.15 times as long for 64 rows.
  // The sums of R rows with C panels from `first` on: [R][C] vectors of `out`, 32 floats a row.
  template <int R, int C, bool kZero>
  [[gnu::noinline]] void panels(const Activations& a, std::int64_t row, std::int64_t first,
                                float* out, std::int64_t ahead) const {
    const std::int64_t size = width / groups, scales_ahead = ahead * 2 / size;
    const std::uint8_t* w = panel(first);
    const std::int8_t* x = a.codes + row * a.stride;
    constexpr int U = R * C <= 8 ? 2 : 1;  // apart for low and high nibbles: more chains
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) {
        sums[r][c] = _mm512_setzero_ps();
        _mm512_store_ps(out + 32 * r + 16 * c, sums[r][c]);
      }
    for (std::int64_t g = 0; g < groups; ++g) {
      __m512i acc[U][R][C];
      begin_group<kZero>(a, row, first, g, acc[0]);
      if (U == 2)
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < C; ++c) acc[U - 1][r][c] = _mm512_setzero_si512();
      for (std::int64_t k = g * size; k < (g + 1) * size; k += 8) {
        __m512i low[C], high[C];
        for (int c = 0; c < C; ++c) {
          const std::uint8_t* eight = w + c * panel_bytes() + 8 * k;
          const __m512i v = _mm512_loadu_si512(eight);
          fetch<R>(eight + ahead);
          low[c] = low_of(v), high[c] = high_of(v);
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
        const std::uint16_t* d = of_group(scale, first + c, g);
        fetch<R>(d + scales_ahead);
        const __m512 s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_of(first + c), d));
        for (int r = 0; r < R; ++r) {
          __m512i sum = acc[0][r][c];
          if (U == 2) sum = _mm512_add_epi32(sum, acc[U - 1][r][c]);
          sums[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, sums[r][c]);
        }
      }
      if (!is_last(g, groups)) continue;
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
          float* at = out + 32 * r + 16 * c;
          _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), sums[r][c]));
          sums[r][c] = _mm512_setzero_ps();
        }
    }
  }

  // sum += four unsigned bytes times the four signed ones at p.
  static inline __m512i dot_at(__m512i sum, __m512i u, const std::int8_t* p) {
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(u), "m"(*reinterpret_cast<const char (*)[4]>(p)));
    return sum;
  }

  // The sums of up to four rows with one panel, 32 floats apart. They wait for the weight, so one
  // panel after the other is one stream through memory; and the fewer instructions a line takes,
  // the more lines a processor has in sight: one row takes two thirds of the time that it took
  // above, four rows half of it.
  template <int R, bool kZero>
  [[gnu::noinline]] void stream(const Activations& a, std::int64_t row, std::int64_t number,
                                float* out) const {
    const std::int64_t size = width / groups, scales_ahead = kAhead * 2 / size,
                       lanes = std::min<std::int64_t>(16, features - number * 16);
    const __mmask16 mask = lanes_of(number);
    const std::uint8_t *w = panel(number), *z = kZero ? of_group(zero, number, 0) : nullptr;
    const std::uint16_t* d = of_group(scale, number, 0);
    const std::int8_t* x = a.codes + row * a.stride;
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(char(0xf0));
    __m512 sums[R], totals[R];
    for (int r = 0; r < R; ++r) sums[r] = totals[r] = _mm512_setzero_ps();
    for (std::int64_t g = 0; g < groups; ++g, d += lanes, z += kZero ? lanes : 0) {
      __m512i acc[R][2], zeros;
      if (kZero) zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, z));
      if (kZero) fetch<1>(z + scales_ahead);
      for (int r = 0; r < R; ++r) {
        // A sum of at most 128 codes fits into the low half, and the zero point's other half is 0.
        const __m512i sum = _mm512_set1_epi32(a.sums[(row + r) * groups + g]);
        acc[r][0] = kZero ? _mm512_madd_epi16(zeros, sum) : sum;
        acc[r][1] = _mm512_setzero_si512();
      }
      for (std::int64_t k = 0; k < size; k += 32, x += 32)
#pragma GCC unroll 4
        for (int j = 0; j < 32; j += 8, w += 64) {
          const __m512i v = _mm512_loadu_si512(w);
          fetch<1>(w + kAhead);
          for (int r = 0; r < R; ++r) {
            const std::int8_t* eight = x + r * a.stride + j;
            acc[r][0] = dot_at(acc[r][0], _mm512_and_si512(v, low), eight);
            acc[r][1] = dot_at(acc[r][1], _mm512_and_si512(v, high), eight + 4);
          }
        }
      fetch<1>(d + scales_ahead);
      const __m512 s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, d));
      for (int r = 0; r < R; ++r) {
        const __m512i sum = _mm512_add_epi32(acc[r][0], _mm512_srai_epi32(acc[r][1], 4));
        sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, sums[r]);
      }
      if (!is_last(g, groups)) continue;
      for (int r = 0; r < R; ++r)
        totals[r] = _mm512_add_ps(totals[r], sums[r]), sums[r] = _mm512_setzero_ps();
    }
    for (int r = 0; r < R; ++r) _mm512_store_ps(out + 32 * r, totals[r]);
  }

  template <int R>
  inline void tile(const Activations& a, std::int64_t row, std::int64_t first, float* out,
                   std::int64_t ahead = kAhead) const {
    const bool pair = (first + 1) * 16 < features;
    if constexpr (R <= 4)
      if (R <= 2 || a.rows <= 4) {
        for (int c = 0; c <= int(pair); ++c)
          zero ? stream<R, true>(a, row, first + c, out + 16 * c)
               : stream<R, false>(a, row, first + c, out + 16 * c);
        return;
      }
    if constexpr (R > 2)
      pair ? with_zeros<R, 2>(a, row, first, out, ahead)
           : with_zeros<R, 1>(a, row, first, out, ahead);
  }

  template <int R, int C>
  inline void with_zeros(const Activations& a, std::int64_t row, std::int64_t first, float* out,
                         std::int64_t ahead) const {
    zero ? panels<R, C, true>(a, row, first, out, ahead)
         : panels<R, C, false>(a, row, first, out, ahead);
  }
#elif defined(TAILOR_AVX2)
  // Four k of eight features, one code a byte: quad 2 j are the low nibbles of vector j, quad
  // 2 j + 1 the high ones.
  static inline __m256i quad(const std::uint8_t* w, std::int64_t number, int column) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(w + number / 2 * 64 + column * 32));
    return _mm256_and_si256(number % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
  }

  // Writes the codes of k in [begin, begin + count) of a panel as bytes: [k / 4][16][4].
  void unpack(std::int64_t first, std::int64_t begin, std::int64_t count,
              std::uint8_t* codes) const {
    const std::uint8_t* w = panel(first) + 8 * begin;
    for (std::int64_t q = 0; q < count / 4; q += 2)
      for (int i = 0; i < 4; ++i)
        _mm256_store_si256((__m256i*)(codes + 64 * q + 32 * i), quad(w, q + i / 2, i % 2));
  }

  template <int R>
  inline void tile(const Activations& a, std::int64_t row, std::int64_t first, float* out,
                   std::int64_t ahead = kAhead) const {
    std::memset(out, 0, R * 16 * sizeof(float));
    sum_groups<R, false>(a, row, first, 0, width, panel(first), out, ahead);
  }

  template <int R>
  inline void add(const Activations& a, std::int64_t row, std::int64_t first, std::int64_t begin,
                  std::int64_t count, const std::uint8_t* codes, float* out, bool) const {
    sum_groups<R, true>(a, row, first, begin, count, codes, out, 0);
  }

  // Adds the sums over k in [begin, begin + count), whole groups, to out [R][16]; `w` are those
  // codes of the panel, as they lie in memory or unpacked.
  template <int R, bool kUnpacked>
  [[gnu::noinline]] void sum_groups(const Activations& a, std::int64_t row, std::int64_t first,
                                    std::int64_t begin, std::int64_t count, const std::uint8_t* w,
                                    float* out, std::int64_t ahead) const {
    const std::int64_t size = width / groups, scales_ahead = ahead * 2 / size;
    const std::int8_t* x = a.codes + row * a.stride + begin;
    const __m256i ones = _mm256_set1_epi16(1);
    std::uint16_t scale_lanes[16] = {};
    std::uint8_t zero_lanes[16] = {};
    alignas(32) float sums[R * 16] = {};
    const std::int64_t end = (begin + count) / size;
    for (std::int64_t g = begin / size; g < end; ++g) {
      alignas(32) std::int32_t acc[R][16];
      const std::uint8_t* z = zero ? of_group(zero, first, g, zero_lanes) : nullptr;
      if (zero && !kUnpacked) fetch<R>(z + scales_ahead);
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
      for (std::int64_t k = 0; k < size; k += 32, x += 32, w += kUnpacked ? 512 : 256) {
        __m256i part[R][2];
        for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
          __m256i u[2];
          for (int c = 0; c < 2; ++c)
            u[c] = kUnpacked ? _mm256_load_si256((const __m256i*)(w + 64 * q + 32 * c))
                             : quad(w, q, c);
          if (!kUnpacked && q % 2 == 0) fetch<R>(w + 32 * q + ahead);
          for (int r = 0; r < R; ++r) {
            const __m256i y = _mm256_set1_epi32(four(x + r * a.stride + 4 * q));
            for (int c = 0; c < 2; ++c)
              part[r][c] = hold(_mm256_add_epi16(part[r][c], _mm256_maddubs_epi16(u[c], y)));
          }
        }
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < 2; ++c) {
            __m256i* at = (__m256i*)(acc[r] + 8 * c);
            _mm256_store_si256(
                at, _mm256_add_epi32(_mm256_load_si256(at), _mm256_madd_epi16(part[r][c], ones)));
          }
      }
      const std::uint16_t* d = of_group(scale, first, g, scale_lanes);
      if (!kUnpacked) fetch<R>(d + scales_ahead);
      for (int c = 0; c < 2; ++c) {
        const __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(d + 8 * c)));
        for (int r = 0; r < R; ++r) {
          float* at = sums + 16 * r + 8 * c;
          const __m256 sum =
              _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i*)(acc[r] + 8 * c)));
          _mm256_store_ps(at, _mm256_fmadd_ps(sum, s, _mm256_load_ps(at)));
        }
      }
      if (!is_last(g, end)) continue;
      for (int i = 0; i < R * 16; ++i) out[i] += sums[i], sums[i] = 0;
    }
  }
#else
  template <int R>
  inline void tile(const Activations& a, std::int64_t row, std::int64_t first, float* out,
                   std::int64_t = 0) const {
    const std::int64_t size = width / groups;
    const std::uint8_t* w = panel(first);
    std::uint16_t scale_lanes[16] = {};
    std::uint8_t zero_lanes[16] = {};
    float sums[R * 16] = {};
    std::memset(out, 0, R * 16 * sizeof(float));
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::uint16_t* d = of_group(scale, first, g, scale_lanes);
      const std::uint8_t* z = zero ? of_group(zero, first, g, zero_lanes) : nullptr;
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
          sums[16 * r + n] +=
              float(acc[r][n / 4][n % 4] + (z ? z[n] : 1) * sum) * to_float(f16{d[n]});
      }
      if (!is_last(g, groups)) continue;
      for (int i = 0; i < R * 16; ++i) out[i] += sums[i], sums[i] = 0;
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
