// One vector of floats, as wide as the level has: F::width lanes. An op written over F is every
// level.
//
// The operators are free functions on purpose: GCC 12 compiles a friend that is defined inside its
// class without the target of the surrounding region.
#pragma once

#if defined(TAILOR_AVX512)
struct F {
  static constexpr int width = 16;
  __m512 v;
  static F zero() { return {_mm512_setzero_ps()}; }
  static F set(float x) { return {_mm512_set1_ps(x)}; }
  static F load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static F load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
  }
  void store(f16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float maximum() const { return _mm512_reduce_max_ps(v); }
};
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F if_less(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline F add_exponent(F a, F n) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), shifted))};
}
#elif defined(TAILOR_AVX2)
struct F {
  static constexpr int width = 8;
  __m256 v;
  static F zero() { return {_mm256_setzero_ps()}; }
  static F set(float x) { return {_mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static F load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m128i low = _mm256_castsi256_si128(rounded),
                  high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
  }
  void store(f16* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float maximum() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F if_less(F a, F b, F yes, F no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline F add_exponent(F a, F n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shifted))};
}
#else
// Portable: GCC vector extensions, so that it also builds where there is no x86.
struct F {
  static constexpr int width = 4;
  typedef float V __attribute__((vector_size(16)));
  V v;
  static F zero() { return {V{0, 0, 0, 0}}; }
  static F set(float x) { return {V{x, x, x, x}}; }
  static F load(const float* p) {
    F r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  template <typename H>
  static F load(const H* p) {
    return {V{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  template <typename H>
  void store(H* p) const {
    for (int i = 0; i < width; ++i) p[i] = from_float<H>(v[i]);
  }
  float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  float maximum() const { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
};
inline F operator+(F a, F b) { return {a.v + b.v}; }
inline F operator-(F a, F b) { return {a.v - b.v}; }
inline F operator*(F a, F b) { return {a.v * b.v}; }
inline F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
inline F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
inline F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
typedef std::int32_t I __attribute__((vector_size(16)));
inline F abs(F a) { return {(F::V)((I)a.v & 0x7fffffff)}; }
inline F operator/(F a, F b) { return {a.v / b.v}; }
inline F if_less(F a, F b, F yes, F no) { return {a.v < b.v ? yes.v : no.v}; }
inline F add_exponent(F a, F n) { return {(F::V)((I)a.v + ((I)n.v << 23))}; }
#endif

// The operators that all levels share follow. Where an operand may be NaN, min, max and if_less
// give their last one.

// A store that passes the caches, to a whole vector's alignment.
inline void stream(float* to, F x) {
#if defined(TAILOR_AVX512)
  _mm512_stream_ps(to, x.v);
#elif defined(TAILOR_AVX2)
  _mm256_stream_ps(to, x.v);
#elif defined(__x86_64__)
  _mm_stream_ps(to, (__m128)x.v);
#else
  x.store(to);
#endif
}

// The first n lanes from memory, the others from `rest`: the end of a row.
template <typename X>
inline F load_part(const X* p, int n, F rest) {
  float lanes[F::width];
  rest.store(lanes);
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return F::load(lanes);
}

template <typename X>
inline void store_part(F x, X* p, int n) {
  float lanes[F::width];
  x.store(lanes);
  for (int i = 0; i < n; ++i) p[i] = from_float<X>(lanes[i]);
}

// e^x within 1.3 units in the last place; below -87.3 it is 0, above 88.3 it stays at e^88.3.
// 2^n e^r with r in [-ln 2 / 2, ln 2 / 2] and the polynomial of Cephes. Adding 1.5 * 2^23 rounds n
// to the low bits of a float, from where it goes straight into the exponent.
inline F exp(F x) {
  const F magic = F::set(12582912.0f);
  const F bounded = min(F::set(88.3f), max(F::set(-87.3f), x));
  const F shifted = fma(bounded, F::set(1.44269504088896341f), magic), n = shifted - magic;
  F r = fma(n, F::set(-0.693359375f), bounded);
  r = fma(n, F::set(2.12194440e-4f), r);
  F p = fma(F::set(1.9875691500e-4f), r, F::set(1.3981999507e-3f));
  p = fma(p, r, F::set(8.3334519073e-3f));
  p = fma(p, r, F::set(4.1665795894e-2f));
  p = fma(p, r, F::set(1.6666665459e-1f));
  p = fma(p, r, F::set(5.0000001201e-1f));
  p = fma(p, r * r, r) + F::set(1.0f);
  return if_less(x, F::set(-87.3f), F::zero(), add_exponent(p, shifted));
}

// log(1 + u) for u in [0, 1]: 2 atanh(s) with s = u / (2 + u) <= 1/3, by its series.
inline F log1p_of_fraction(F u) {
  const F s = u / (u + F::set(2.0f)), z = s * s;
  F p = fma(F::set(1.0f / 15), z, F::set(1.0f / 13));
  p = fma(p, z, F::set(1.0f / 11));
  p = fma(p, z, F::set(1.0f / 9));
  p = fma(p, z, F::set(1.0f / 7));
  p = fma(p, z, F::set(1.0f / 5));
  p = fma(p, z, F::set(1.0f / 3));
  const F twice = s + s;
  return fma(twice * z, p, twice);
}

// Near zero the polynomial of Cephes, elsewhere 1 - 2 / (e^2x + 1).
inline F tanh(F x) {
  const F a = abs(x), z = x * x;
  F p = fma(F::set(-5.70498872745e-3f), z, F::set(2.06390887954e-2f));
  p = fma(p, z, F::set(-5.37397155531e-2f));
  p = fma(p, z, F::set(1.33314422036e-1f));
  p = fma(p, z, F::set(-3.33332819422e-1f));
  const F near_zero = fma(p * z, x, x);
  const F far = F::set(1.0f) - F::set(2.0f) / (exp(a + a) + F::set(1.0f));
  return if_less(a, F::set(0.625f), near_zero, if_less(x, F::zero(), F::zero() - far, far));
}

// Calls f with a typed pointer for each dtype that kernels read.
template <typename Function>
inline void with_dtype(int dtype, address x, Function&& f) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return f(as<const float>(x));
    case DType::f64:
      return f(as<const double>(x));
    case DType::bf16:
      return f(as<const bf16>(x));
    case DType::f16:
      return f(as<const f16>(x));
  }
}

// Calls f with a typed pointer for each dtype whose values float32 holds.
template <typename Function>
inline void with_float(int dtype, address x, Function&& f) {
  with_dtype(dtype, x, [&](auto* typed) {
    if constexpr (!std::is_same_v<decltype(typed), const double*>) f(typed);
  });
}
