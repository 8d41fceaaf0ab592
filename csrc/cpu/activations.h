// Activations as int8, each token by its own scale: the left operand of int8_linear and
// int4_linear.
//
// The weight lies in panels of 16 output features (tailor_engine/ops/_layout.py): byte t of lane n
// is k = 4 j + t, so that one 512-bit vector, or two 256-bit ones, hold four k of a panel.
#pragma once

namespace quantized {
constexpr int kPanel = 16;

// Eight codes, and what is added to their products' two lanes; see octets.h.
struct Octet {
  std::int8_t codes[8];
  std::int16_t offset[2];
};
// What four codes lost on their way into an octet.
struct Remainder {
  std::int32_t four;  // k / 4
  std::int8_t codes[4];
};

struct Activations {
  std::int64_t rows, width, stride, groups;
  std::int8_t* codes;  // [rows][stride], zeros after K
  std::int32_t* sums;  // [rows][groups]: the codes of a group, summed
  float* scales;       // [rows]
  // Forms of the codes that a level alone reads:
  std::int16_t* halves;            // baseline: [rows][stride], k 0, 2, 1, 3 of each four
  Octet* octets;                   // AVX2, more than two rows: [rows][stride / 8]
  Remainder* remainders;           // [rows][stride / 4], of which
  std::int32_t* remainder_counts;  // [rows] are in use
};

// Room for the activations of few rows, so that Python need not allocate any. The same number
// stands in tailor_engine/ops/_quantize.py.
struct alignas(64) Stack {
  char bytes[32768];
};

// Python hands over a block of rows * (5 * stride + 4 * groups + 8) bytes (3 * stride for one or
// two rows), or 0 where they fit on the stack.
inline Activations carve(address workspace, Stack& stack, std::int64_t rows, std::int64_t width,
                         std::int64_t groups) {
  if (!workspace) workspace = reinterpret_cast<address>(stack.bytes);
  Activations a{};
  a.rows = rows, a.width = width, a.stride = (width + 63) / 64 * 64, a.groups = groups;
  const auto take = [&](auto*& part, std::int64_t count) {
    part = as<std::remove_reference_t<decltype(*part)>>(workspace);
    workspace += count * sizeof *part;
  };
  const std::int64_t codes = rows * a.stride;
#if !defined(TAILOR_AVX2)
  take(a.halves, codes);
#elif !defined(TAILOR_AVX512)
  if (rows > 2) {
    take(a.octets, codes / 8);
    take(a.remainders, codes / 4);
    take(a.remainder_counts, rows);
  }
#endif
  take(a.codes, codes);
  take(a.sums, rows * groups);
  take(a.scales, rows);
  return a;
}

// Rounds half to even (the processor's mode). NaN becomes -127; its row has a NaN scale anyway.
inline void store_codes(F x, std::int8_t* p) {
  const F v = min(max(x, F::set(-127.0f)), F::set(127.0f));
#if defined(TAILOR_AVX512)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
#elif defined(TAILOR_AVX2)
  const __m256i wide = _mm256_cvtps_epi32(v.v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
#else
  float lanes[F::width];
  v.store(lanes);
  const float magic = 12582912.0f;  // adding 1.5 * 2^23 leaves the rounded integer in the low bits
  for (int i = 0; i < F::width; ++i) p[i] = std::int8_t((lanes[i] + magic) - magic);
#endif
}

// The definition of ops/_quantize.py: scale = absmax / 127, code = round(x / scale), in float32.
// With a factor of 0 nobody reads the sums.
template <typename X>
inline void quantize_row(const X* x, const Activations& a, std::int64_t row, int factor,
                         bool halves) {
  const std::int64_t full = a.width - a.width % F::width;
  const int rest = int(a.width - full);
  constexpr int kChains = 4;            // or each value would wait for the last one's sum
  F largest[kChains], poison[kChains];  // x * 0 is NaN where x is not finite
  for (int i = 0; i < kChains; ++i) largest[i] = poison[i] = F::zero();
  const auto look = [&](int i, F v) {
    largest[i] = max(largest[i], abs(v));
    poison[i] = fma(v, F::zero(), poison[i]);
  };
  std::int64_t seen = 0;
  for (; seen + kChains * F::width <= full; seen += kChains * F::width)
    for (int i = 0; i < kChains; ++i) look(i, F::load(x + seen + i * F::width));
  for (; seen < full; seen += F::width) look(0, F::load(x + seen));
  if (rest) look(0, load_part(x + full, rest, F::zero()));
  for (int i = 1; i < kChains; ++i) {
    largest[0] = max(largest[0], largest[i]);
    poison[0] = poison[0] + poison[i];
  }
  float scale = (largest[0].maximum() + poison[0].sum()) / 127.0f;
  if (scale == 0.0f) scale = 1.0f;
  a.scales[row] = scale;

  std::int8_t* codes = a.codes + row * a.stride;
  const F divisor = F::set(scale);
  for (std::int64_t k = 0; k < full; k += F::width)
    store_codes(F::load(x + k) / divisor, codes + k);
  if (rest) {  // 16 lanes at most, and the row is padded to 64
    store_codes(load_part(x + full, rest, F::zero()) / divisor, codes + full);
  }
  const std::int64_t written = full + (rest ? F::width : 0);
  std::memset(codes + written, 0, std::size_t(a.stride - written));
  const std::int64_t group = a.width / a.groups;
  for (std::int64_t g = 0; factor && g < a.groups; ++g) {
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < group; ++k) sum += codes[g * group + k];
    a.sums[row * a.groups + g] = factor * sum;
  }
  if (!halves) return;
  std::int16_t* wide = a.halves + row * a.stride;
  for (std::int64_t k = 0; k < a.stride; k += 4) {
    wide[k] = codes[k], wide[k + 1] = codes[k + 2];
    wide[k + 2] = codes[k + 1], wide[k + 3] = codes[k + 3];
  }
}

// Four bytes, or two int16.
inline std::int32_t four(const void* p) {
  std::int32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}

#if !defined(TAILOR_AVX2)
typedef std::int16_t Words __attribute__((vector_size(16)));
typedef std::int32_t Longs __attribute__((vector_size(16)));

inline Words load_words(const void* p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The two words at p, four times.
inline Words repeat(const std::int16_t* p) {
  const std::int32_t two = four(p);
  return (Words)Longs{two, two, two, two};
}

// The sums of neighbours, as int32.
inline Longs widen(Words x) {
  const Longs v = (Longs)x;
  return (v << 16 >> 16) + (v >> 16);
}
#endif

#if defined(TAILOR_AVX2)
// Keeps a sum in its register: GCC 12 otherwise defers the additions and spills every product (26
// instead of 39 products a cycle in int4_linear). By value: an array whose elements are operands of
// asm would lie in memory.
inline __m256i hold(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}
#endif

#if defined(TAILOR_AVX512)
// sum += four unsigned times four signed bytes. As an intrinsic, GCC 12 copies every accumulator
// through another register, which doubles the instructions of the loop.
inline __m512i dot(__m512i sum, __m512i u, __m512i s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
}
#endif

#if defined(TAILOR_AVX512)
// Where the next four codes of R rows stand. A pointer serves three rows, through a scaled index:
// twelve pointers would not stay in registers.
template <int R>
struct Rows {
  const std::int8_t* thirds[(R + 2) / 3];
  std::int64_t stride;

  Rows(const Activations& a, std::int64_t row, std::int64_t k) : stride(a.stride) {
    for (int i = 0; i < (R + 2) / 3; ++i) thirds[i] = a.codes + (row + 3 * i) * stride + k;
  }
  __m512i four_of(int r) const { return _mm512_set1_epi32(four(thirds[r / 3] + r % 3 * stride)); }
  void step() {
    for (auto& p : thirds) p = apart(p + 4);
  }

 private:
  // Hides from the compiler what the pointers have in common.
  static const std::int8_t* apart(const std::int8_t* p) {
    asm("" : "+r"(p));
    return p;
  }
};
#endif

// Calls f with the number of rows as a constant.
template <int R, typename Function>
inline void with_rows(int rows, Function&& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, f);
  }
  f(std::integral_constant<int, R>());
}
}  // namespace quantized
