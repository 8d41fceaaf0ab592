// Attention of one token over a cache, a range of keys at a time: each thread takes some of the
// keys for all heads, and the parts are mixed by their maxima and sums afterwards. Heads that share
// keys read them once; their sums stay in registers.
#pragma once

namespace decode_detail {
using attention_detail::kKeys;
using attention_detail::kNever;
using attention_detail::Softmax;
using head_detail::Ahead;

// Heads of one pass, and keys whose scores are summed side by side: all sums stay in registers.
constexpr int kHeads = F::width == 16 ? 4 : 3, kTogether = 4;
constexpr int kWide = 4;  // vectors of the output that a pass over the values sums

#if defined(TAILOR_AVX512)
// Sums of lanes two apart, of a and b in turn. (A lambda would lose the region's target.)
inline __m512 halved(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
#elif defined(TAILOR_AVX2)
// Sums of lanes two apart, of a and b in turn. (A lambda would lose the region's target.)
inline __m256 halved(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}
#endif

// to[i] = the sum of x[i]'s lanes.
inline void store_sums(const F (&x)[kTogether], float* to) {
#if defined(TAILOR_AVX512)
  const __m512 a = halved(x[0].v, x[1].v), b = halved(x[2].v, x[3].v),
               c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 sums = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
#elif defined(TAILOR_AVX2)
  const __m256 a = halved(x[0].v, x[1].v), b = halved(x[2].v, x[3].v),
               sums = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
#endif
#if defined(TAILOR_AVX2)
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int i = 0; i < kTogether; ++i) to[i] = x[i].sum();
#endif
}

// scores[R][kKeys] = query[R][size] . keys[count][size], for the part of size in whole vectors.
// Scores up to the next multiple of kTogether are written, too. One key after the other, each with
// a sum across lanes for every head, takes 1.5 times as long at AVX2. `values` are asked for.
template <int R, typename X>
inline void score(const float* query, const X* keys, std::int64_t size, int count, float* scores,
                  Ahead values) {
  const std::int64_t whole = size / F::width * F::width;
  const int lines = int(kTogether * size * sizeof(X) / 64);
  for (int i = 0; i < count; i += kTogether) {
    values.lines(lines);
    F sums[R][kTogether];
    const X* key[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      key[j] = keys + std::min(i + j, count - 1) * size;
      for (int r = 0; r < R; ++r) sums[r][j] = F::zero();
    }
    for (std::int64_t d = 0; d < whole; d += F::width)
      for (int j = 0; j < kTogether; ++j) {
        const F k = F::load(key[j] + d);
        for (int r = 0; r < R; ++r) sums[r][j] = fma(F::load(query + r * size + d), k, sums[r][j]);
      }
    for (int r = 0; r < R; ++r) store_sums(sums[r], scores + r * kKeys + i);
  }
}

// output[R][V vectors] = factor[R] * output + weights[R][count] values[count][V vectors]; `keys`
// are asked for.
template <int R, int V, typename X>
inline void weigh(const float* weights, const float* factor, const X* values, std::int64_t size,
                  int count, float* output, Ahead& keys) {
  const int lines = int((size * sizeof(X) + 63) / 64);
  F sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v] = F::load(output + r * (2 + size) + v * F::width) * F::set(factor[r]);
  for (int i = 0; i < count; ++i, values += size) {
    keys.lines(lines);
    for (int v = 0; v < V; ++v) {
      const F x = F::load(values + v * F::width);
      for (int r = 0; r < R; ++r) sums[r][v] = fma(F::set(weights[r * kKeys + i]), x, sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v].store(output + r * (2 + size) + v * F::width);
}

// Some keys of one group for R of its heads. query [R][size], scaled; partial [R][2 + size]: the
// largest score, the sum of e^(score - largest), and the values so weighed and summed. The keys and
// values of a token have left the caches by the next one: each block's are asked for during the
// block before, and the keys `next`, if any, during the last. A step of SmolLM2 after 128 tokens
// takes 0.1 ms less by that.
template <int R, typename X>
inline void attend(const float* query, const X* keys, const X* values, std::int64_t size,
                   std::int64_t count, float softcap, float* partial, const X* next) {
  alignas(64) float scores[R * kKeys] = {};
  Softmax softmax[R];
  std::fill_n(partial, R * (2 + size), 0.0f);
  const std::int64_t panels = size / (kWide * F::width) * (kWide * F::width),
                     whole = size / F::width * F::width;
  for (std::int64_t s = 0; s < count; s += kKeys) {
    const int found = int(std::min<std::int64_t>(kKeys, count - s));
    const X *k = keys + s * size, *v = values + s * size;
    const std::int64_t block = found * size * std::int64_t(sizeof(X));
    const bool last = s + found == count;
    score<R>(query, k, size, found, scores, Ahead(v, block));
    Ahead ahead(last ? next : k + found * size, last && !next ? 0 : kKeys * size * sizeof(X));
    float factor[R];
    std::int64_t d;
    for (int r = 0; r < R; ++r) {
      float* row = scores + r * kKeys;
      for (int i = 0; i < found; ++i)
        for (d = whole; d < size; ++d) row[i] += query[r * size + d] * to_float(k[i * size + d]);
      if (softcap)
        for (int i = 0; i < kKeys; i += F::width)
          (tanh(F::load(row + i) / F::set(softcap)) * F::set(softcap)).store(row + i);
      std::fill(row + found, row + kKeys, kNever);
      factor[r] = softmax[r].add(row, (found + F::width - 1) / F::width * F::width);
    }
    float* output = partial + 2;
    for (d = 0; d < panels; d += kWide * F::width)
      weigh<R, kWide>(scores, factor, v + d, size, found, output + d, ahead);
    for (; d < whole; d += F::width)
      weigh<R, 1>(scores, factor, v + d, size, found, output + d, ahead);
    for (; d < size; ++d)
      for (int r = 0; r < R; ++r) {
        float& sum = output[r * (2 + size) + d];
        sum *= factor[r];
        for (int i = 0; i < found; ++i) sum += scores[r * kKeys + i] * to_float(v[i * size + d]);
      }
  }
  for (int r = 0; r < R; ++r) {
    partial[r * (2 + size)] = softmax[r].maximum;
    partial[r * (2 + size) + 1] = softmax[r].sum;
  }
}

// output[heads][size] of all threads' parts, `stride` floats apart.
inline void mix(const float* partial, std::int64_t stride, int parts, std::int64_t heads,
                std::int64_t size, float* output) {
  for (std::int64_t h = 0; h < heads; ++h, partial += 2 + size, output += size) {
    float largest = kNever, sum = 0;
    for (int t = 0; t < parts; ++t) largest = std::max(largest, partial[t * stride]);
    for (int t = 0; t < parts; ++t)
      sum += partial[t * stride + 1] * std::exp(partial[t * stride] - largest);
    std::fill_n(output, size, 0.0f);
    for (int t = 0; t < parts; ++t) {
      const float* part = partial + t * stride;
      const float weight = std::exp(part[0] - largest) / sum;
      for (std::int64_t d = 0; d < size; ++d) output[d] += weight * part[2 + d];
    }
  }
}
}  // namespace decode_detail
