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
  float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  float maximum() const { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
};
inline F operator+(F a, F b) { return {a.v + b.v}; }
inline F operator-(F a, F b) { return {a.v - b.v}; }
inline F operator*(F a, F b) { return {a.v * b.v}; }
inline F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
inline F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
inline F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
inline F abs(F a) { return {a.v < 0.0f ? -a.v : a.v}; }
#endif

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
