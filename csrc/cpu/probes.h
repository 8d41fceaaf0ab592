// What this machine could do at most, at one level: the ceilings that benchmarks divide by. These
// are no ops and nothing in the package calls them. Each returns the bytes or operations it did.
#pragma once

namespace probe_detail {
constexpr int kChains =
    12;               // independent sums: hides a latency of 6 with two units, in 16 registers
volatile float sink;  // keeps the results alive

// Makes the compiler believe that x is new: equal sums would be computed once.
template <typename V>
inline void renew(V& x) {
  asm volatile("" : "+v"(x));
}

// Sums one thread's part along `streams` places at once, each prefetched `ahead` floats.
template <int streams>
inline float read_part(const float* p, std::int64_t count, int ahead) {
  constexpr int kWide = 8 / streams;  // vectors a stream and step: eight loads in flight
  const std::int64_t share = count / streams, step = kWide * F::width;
  F sums[8];
  for (F& sum : sums) sum = F::zero();
  for (std::int64_t i = 0; i + step <= share; i += step)
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s)
#pragma GCC unroll 8
      for (int k = 0; k < kWide; ++k) {
        const float* at = p + s * share + i + k * F::width;
        if (ahead) __builtin_prefetch(at + ahead);
        sums[s * kWide + k] = sums[s * kWide + k] + F::load(at);
      }
  for (int k = 1; k < 8; ++k) sums[0] = sums[0] + sums[k];
  return sums[0].sum();
}

inline void copy_part(const float* from, float* to, std::int64_t count, int ahead) {
  for (std::int64_t i = 0; i + 4 * F::width <= count; i += 4 * F::width)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const std::int64_t at = i + k * F::width;
      if (ahead) __builtin_prefetch(from + at + ahead);
      stream(to + at, F::load(from + at));
    }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One thread's part of a buffer, in whole cache lines.
inline std::int64_t part_of(std::int64_t count, int threads) { return count / threads / 64 * 64; }

#if !defined(TAILOR_AVX2)
constexpr int kBytes = 2048;
inline std::int32_t portable_products(const std::int8_t* a, const std::int8_t* b) {
  std::int32_t sum = 0;
  for (int k = 0; k < kBytes; ++k) sum += std::int32_t(a[k]) * b[k];
  return sum;
}
#endif
}  // namespace probe_detail

// Reads a buffer once; `streams` 1 or 4, `ahead` in bytes.
inline double probe_read(address from, std::int64_t bytes, int streams, int ahead, int threads) {
  const std::int64_t part = probe_detail::part_of(bytes / 4, threads);
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    const float* p = as<const float>(from) + t * part;
    total += streams == 4 ? probe_detail::read_part<4>(p, part, ahead / 4)
                          : probe_detail::read_part<1>(p, part, ahead / 4);
  }
  probe_detail::sink = total;
  return 4.0 * part * threads;
}

// Copies a buffer once, with stores that pass the caches, or with memcpy where `ahead` is negative.
// Counts what is read and what is written.
inline double probe_copy(address from, address to, std::int64_t bytes, int ahead, int threads) {
  const std::int64_t part = probe_detail::part_of(bytes / 4, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    const float* p = as<const float>(from) + t * part;
    float* q = as<float>(to) + t * part;
    if (ahead < 0)
      std::memcpy(q, p, 4 * part);
    else
      probe_detail::copy_part(p, q, part, ahead / 4);
  }
  return 8.0 * part * threads;
}

// float32 multiply-adds on registers.
inline double probe_float32(std::int64_t rounds, int threads) {
  constexpr int kChains = probe_detail::kChains;
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    F sums[kChains], factor = F::set(0.999f), term = F::set(0.001f);
    for (int k = 0; k < kChains; ++k) sums[k] = F::set(float(k));
    for (std::int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
      for (int k = 0; k < kChains; ++k) sums[k] = fma(sums[k], factor, term);
    for (int k = 0; k < kChains; ++k) total += sums[k].sum();
  }
  probe_detail::sink = total;
  return 2.0 * rounds * kChains * F::width * threads;
}

// Integer products summed in int32, on registers: vpdpbusd with VNNI. At AVX2 vpmaddubsw, of which
// `depth` are summed in int16 before a vpmaddwd widens them: 1 for 8-bit operands, whose sums would
// overflow; 8 where one operand has 4 bits. The baseline runs a plain loop over the L1 cache.
inline double probe_integer(std::int64_t rounds, int depth, int threads) {
  [[maybe_unused]] constexpr int kChains = probe_detail::kChains;
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
#if defined(TAILOR_AVX512)
    __m512i sums[kChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(t);
    for (auto& sum : sums) sum = _mm512_setzero_si512(), probe_detail::renew(sum);
    for (std::int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
      for (int k = 0; k < kChains; ++k) sums[k] = _mm512_dpbusd_epi32(sums[k], a, b);
    for (auto& sum : sums) total += _mm512_reduce_add_epi32(sum);
#elif defined(TAILOR_AVX2)
    constexpr int kSums = kChains / 3;  // each has an int16 sum and a product beside it
    __m256i sums[kSums], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(t),
                         ones = _mm256_set1_epi16(1);
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (std::int64_t r = 0; r < rounds; ++r) {
      __m256i narrow[kSums];
#pragma GCC unroll 16
      for (int k = 0; k < kSums; ++k) {
        probe_detail::renew(a);
        narrow[k] = _mm256_maddubs_epi16(a, b);
      }
      for (int d = 1; d < depth; ++d)
#pragma GCC unroll 16
        for (int k = 0; k < kSums; ++k) {
          probe_detail::renew(a);
          narrow[k] = _mm256_add_epi16(narrow[k], _mm256_maddubs_epi16(a, b));
          probe_detail::renew(narrow[k]);  // GCC 12 spills the products otherwise
        }
#pragma GCC unroll 16
      for (int k = 0; k < kSums; ++k)
        sums[k] = _mm256_add_epi32(sums[k], _mm256_madd_epi16(narrow[k], ones));
    }
    for (auto& sum : sums) total += _mm256_extract_epi32(sum, 0);
#else
    std::int8_t a[probe_detail::kBytes], b[probe_detail::kBytes];
    std::fill_n(a, probe_detail::kBytes, 3), std::fill_n(b, probe_detail::kBytes, t);
    for (std::int64_t r = 0; r < rounds; ++r) {
      asm volatile("" : : "r"(a), "r"(b) : "memory");  // the arrays may have changed
      total += probe_detail::portable_products(a, b);
    }
#endif
  }
  probe_detail::sink = total;
#if defined(TAILOR_AVX512)
  return 2.0 * rounds * kChains * 64 * threads;
#elif defined(TAILOR_AVX2)
  return 2.0 * rounds * (kChains / 3) * depth * 32 * threads;
#else
  return 2.0 * rounds * probe_detail::kBytes * threads;
#endif
}

#if defined(TAILOR_AVX512)
// bfloat16 products summed in float32, on registers; 0 where the processor has no vdpbf16ps.
__attribute__((target("avx512bf16"))) inline double probe_bfloat16(std::int64_t rounds,
                                                                   int threads) {
  constexpr int kChains = probe_detail::kChains;
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    __m512 sums[kChains];
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(t);
    for (auto& sum : sums) sum = _mm512_setzero_ps(), probe_detail::renew(sum);
    for (std::int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
      for (int k = 0; k < kChains; ++k) sums[k] = _mm512_dpbf16_ps(sums[k], a, b);
    for (auto& sum : sums) total += _mm512_reduce_add_ps(sum);
  }
  probe_detail::sink = total;
  return 2.0 * rounds * kChains * 32 * threads;
}
#else
inline double probe_bfloat16(std::int64_t, int) { return 0; }
#endif

#define TAILOR_PROBES(X) \
  X(probe_read)          \
  X(probe_copy)          \
  X(probe_float32)       \
  X(probe_integer)       \
  X(probe_bfloat16)
