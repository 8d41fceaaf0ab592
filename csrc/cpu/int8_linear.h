// int8_linear: y[T, N] = token scale * feature scale * (int8 x)(int8 weight)^T + bias.
//
// The integer sums are exact at every level.
//   avx512vnni: vpdpbusd multiplies unsigned by signed bytes, so the weight takes part as w + 128
//     and the sums start at -128 * (sum of the activations).
//   avx2: octets.h; for one or two rows, which cannot wait for octets, |w| times x with the sign of
//     w, vpmaddubsw.
//   baseline: plain vectors. The bytes of a lane split into k 0, 2 and k 1, 3 by shifts, once for
//     many rows, and the activations are stored in that order; the sum of two products fits into
//     int16.
#pragma once

namespace int8_detail {
using namespace quantized;

struct Kernel {
#if defined(TAILOR_AVX512)
  static constexpr int kRows = 12, kPanels = 2;  // 24 of the 32 registers hold sums
  static constexpr int kUnpackedRows = 0, kUnpackedPanels = 1, kUnpackFrom = 0;  // as good packed
  static constexpr bool kHalves = false, kOctets = false;
#elif defined(TAILOR_AVX2)
  static constexpr int kRows = 4, kPanels = 1;  // 8 of the 16 registers hold sums
  static constexpr int kUnpackedRows = 3, kUnpackedPanels = 1, kUnpackFrom = 24;
  static constexpr bool kHalves = false, kOctets = true;
  static void regroup(const Activations& a, std::int64_t row) { write_octets(a, row); }
#else
  static constexpr int kRows = 2, kPanels = 1;
  static constexpr int kUnpackedRows = 0, kUnpackedPanels = 1, kUnpackFrom = 0;
  static constexpr bool kHalves = true, kOctets = false;
#endif
  static constexpr int kUnpackedBytes = 16;  // a panel's for one k
  // How far ahead one or two rows fetch the weight, in bytes: all of the read bandwidth on Zen 5
  // (39 GB/s), 34 at a quarter of it.
  static constexpr std::int64_t kAhead = 8192;
  const std::int8_t* weight;  // [panels][steps][16][4]
  std::int64_t panels, steps;

#if defined(TAILOR_AVX512)
  int factor() const { return -128; }
#else
  int factor() const { return 0; }  // needs no sums
#endif
  std::int64_t panel_bytes() const { return steps * 64; }
  const std::int8_t* panel(std::int64_t number) const { return weight + number * panel_bytes(); }

  template <int R>
  [[gnu::noinline]] void tile(const Activations& a, std::int64_t row, std::int64_t first,
                              float* out, [[maybe_unused]] std::int64_t ahead = kAhead) const {
    const std::int8_t* w = panel(first);
#if defined(TAILOR_AVX512)
    const __m512i offset = _mm512_set1_epi8(char(0x80));
    const std::int8_t* x = a.codes + row * a.stride;
    if constexpr (R <= 4) {
      // Few rows wait for the weight: one panel after the other is one stream through memory, 30 %
      // faster than two at once.
      const int found = int(std::min<std::int64_t>(2, panels - first));
      for (int c = 0; c < found; ++c, w += steps * 64) {
        __m512i acc[2][R];  // by the parity of the step
        for (int r = 0; r < R; ++r)
          acc[0][r] = _mm512_set1_epi32(a.sums[row + r]), acc[1][r] = _mm512_setzero_si512();
        for (std::int64_t k = 0; k < steps; k += 2)
          for (int u = 0; u < 2; ++u) {
            const std::int8_t* at = w + 64 * (k + u);
            fetch<1>(at + kAhead);
            const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(at), offset);
            for (int r = 0; r < R; ++r)
              acc[u][r] =
                  dot(acc[u][r], v, _mm512_set1_epi32(four(x + r * a.stride + 4 * (k + u))));
          }
        for (int r = 0; r < R; ++r)
          _mm512_store_ps(out + 32 * r + 16 * c,
                          _mm512_cvtepi32_ps(_mm512_add_epi32(acc[0][r], acc[1][r])));
      }
      return;
    }
    // A last panel without a neighbour is computed twice; the second copy is never stored.
    const std::int8_t* w1 = first + 1 < panels ? w + steps * 64 : w;
    __m512i acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_set1_epi32(a.sums[row + r]);
    Rows<R> rows(a, row, 0);
    for (std::int64_t k = 0; k < steps; ++k, rows.step()) {
      const __m512i v0 = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * k), offset);
      const __m512i v1 = _mm512_xor_si512(_mm512_loadu_si512(w1 + 64 * k), offset);
      fetch<R>(w + 64 * k + ahead);
      fetch<R>(w1 + 64 * k + ahead);
      for (int r = 0; r < R; ++r) {
        const __m512i y = rows.four_of(r);
        acc[r][0] = dot(acc[r][0], v0, y);
        acc[r][1] = dot(acc[r][1], v1, y);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 2; ++c)
        _mm512_store_ps(out + 32 * r + 16 * c, _mm512_cvtepi32_ps(acc[r][c]));
#elif defined(TAILOR_AVX2)
    if constexpr (R > 2) {
      std::memset(out, 0, sizeof(float[R][16]));
      add_octets<R, false>(a, row, 0, w, steps / 2, ahead ? w + ahead : nullptr, out);
      return finish_sums<R>(a, row, w, out);
    }
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (std::int64_t k = 0; k < steps; ++k) {
      const __m256i v0 = _mm256_loadu_si256((const __m256i*)(w + 64 * k)),
                    v1 = _mm256_loadu_si256((const __m256i*)(w + 64 * k + 32));
      fetch<R>(w + 64 * k + ahead);
      const __m256i u0 = _mm256_abs_epi8(v0), u1 = _mm256_abs_epi8(v1);
      for (int r = 0; r < R; ++r) {  // two products: at most 2 * 128 * 127 = 32,512 < 32,768
        const __m256i y = _mm256_set1_epi32(four(a.codes + (row + r) * a.stride + 4 * k));
        const __m256i p0 = _mm256_maddubs_epi16(u0, _mm256_sign_epi8(y, v0)),
                      p1 = _mm256_maddubs_epi16(u1, _mm256_sign_epi8(y, v1));
        acc[r][0] = hold(_mm256_add_epi32(acc[r][0], _mm256_madd_epi16(p0, ones)));
        acc[r][1] = hold(_mm256_add_epi32(acc[r][1], _mm256_madd_epi16(p1, ones)));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 2; ++c)
        _mm256_store_ps(out + 16 * r + 8 * c, _mm256_cvtepi32_ps(acc[r][c]));
#else
    const std::int16_t* x = a.halves + row * a.stride;
    Longs acc[R][4] = {};
    for (std::int64_t k = 0; k < steps; ++k)
      for (int c = 0; c < 4; ++c) {
        const Words v = load_words(w + 64 * k + 16 * c), even = v << 8 >> 8, odd = v >> 8;
        for (int r = 0; r < R; ++r) {  // at most 2 * 128 * 127 = 32,512 < 32,768
          const std::int16_t* pairs = x + r * a.stride + 4 * k;
          acc[r][c] += widen(even * repeat(pairs) + odd * repeat(pairs + 2));
        }
      }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < 16; ++n) out[16 * r + n] = float(acc[r][n / 4][n % 4]);
#endif
  }

#if defined(TAILOR_AVX2) && !defined(TAILOR_AVX512)
  // Writes w + 128 for k in [begin, begin + count) of a panel.
  void unpack(std::int64_t first, std::int64_t begin, std::int64_t count,
              std::uint8_t* codes) const {
    const std::int8_t* w = panel(first) + 16 * begin;
    for (std::int64_t i = 0; i < (count + 7) / 8 * 128; i += 32)
      _mm256_store_si256((__m256i*)(codes + i),
                         _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(w + i)),
                                          _mm256_set1_epi8(char(0x80))));
  }

  // Adds the sums over k in [begin, begin + count) to out [R][16], integers until the last ones.
  template <int R>
  void add(const Activations& a, std::int64_t row, std::int64_t first, std::int64_t begin,
           std::int64_t count, const std::uint8_t* codes, float* out, bool last) const {
    add_octets<R, true>(a, row, begin, (const std::int8_t*)codes, (count + 7) / 8, nullptr, out);
    if (last) finish_sums<R>(a, row, panel(first), out);
  }
#endif
};
}  // namespace int8_detail

// x [rows, width] with rows `x_stride` apart; weight [ceil(features / 16), 2 ceil(width / 8), 16,
// 4]; scale, bias (or zero) float; y [rows, features] contiguous, of x's dtype (not f64).
inline void int8_linear(address x, int dtype, std::int64_t rows, std::int64_t width,
                        std::int64_t x_stride, address weight, address scale, address bias,
                        address y, std::int64_t features, address workspace, int threads) {
  quantized::Stack stack;
  const quantized::Activations a = quantized::carve(workspace, stack, rows, width, 1);
  const int8_detail::Kernel kernel{as<const std::int8_t>(weight), (features + 15) / 16,
                                   (width + 7) / 8 * 2};
  quantized::dispatch(x, dtype, x_stride, a, kernel, scale, bias, y, features, threads);
}
