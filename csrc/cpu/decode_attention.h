// Attention of one token over a cache, a range of keys at a time: each thread takes some of the
// keys for all heads, and the parts are mixed by their maxima and sums afterwards. Heads that share
// keys read them once; their sums stay in registers.
#pragma once

namespace decode_detail {
using attention_detail::kKeys;
using attention_detail::kNever;
using attention_detail::kVectors;
using attention_detail::Softmax;

constexpr int kHeads = 4;  // of one pass: 16 of 32 registers hold their sums with AVX-512

// scores[R][kKeys] += query[R][V vectors] . keys[count][V vectors]
template <int R, int V, typename X>
inline void score(const float* query, const X* keys, std::int64_t size, int count, float* scores) {
  F q[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) q[r][v] = F::load(query + r * size + v * F::width);
  for (int i = 0; i < count; ++i, keys += size) {
    F sums[R];
    for (int r = 0; r < R; ++r) sums[r] = F::zero();
    for (int v = 0; v < V; ++v) {
      const F k = F::load(keys + v * F::width);
      for (int r = 0; r < R; ++r) sums[r] = fma(q[r][v], k, sums[r]);
    }
    for (int r = 0; r < R; ++r) scores[r * kKeys + i] += sums[r].sum();
  }
}

// output[R][V vectors] = factor[R] * output + weights[R][count] values[count][V vectors]
template <int R, int V, typename X>
inline void weigh(const float* weights, const float* factor, const X* values, std::int64_t size,
                  int count, float* output) {
  F sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v] = F::load(output + r * (2 + size) + v * F::width) * F::set(factor[r]);
  for (int i = 0; i < count; ++i, values += size)
    for (int v = 0; v < V; ++v) {
      const F x = F::load(values + v * F::width);
      for (int r = 0; r < R; ++r) sums[r][v] = fma(F::set(weights[r * kKeys + i]), x, sums[r][v]);
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v].store(output + r * (2 + size) + v * F::width);
}

// Some keys of one group for R of its heads. query [R][size], scaled; partial [R][2 + size]: the
// largest score, the sum of e^(score - largest), and the values so weighed and summed.
template <int R, typename X>
inline void attend(const float* query, const X* keys, const X* values, std::int64_t size,
                   std::int64_t count, float softcap, float* partial) {
  alignas(64) float scores[R * kKeys];
  Softmax softmax[R];
  std::fill_n(partial, R * (2 + size), 0.0f);
  const std::int64_t panels = size / (kVectors * F::width) * (kVectors * F::width),
                     whole = size / F::width * F::width;
  for (std::int64_t s = 0; s < count; s += kKeys) {
    const int found = int(std::min<std::int64_t>(kKeys, count - s));
    const X *k = keys + s * size, *v = values + s * size;
    std::fill_n(scores, R * kKeys, 0.0f);
    std::int64_t d = 0;
    for (; d < panels; d += kVectors * F::width)
      score<R, kVectors>(query + d, k + d, size, found, scores);
    for (; d < whole; d += F::width) score<R, 1>(query + d, k + d, size, found, scores);
    float factor[R];
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
    for (d = 0; d < panels; d += kVectors * F::width)
      weigh<R, kVectors>(scores, factor, v + d, size, found, output + d);
    for (; d < whole; d += F::width) weigh<R, 1>(scores, factor, v + d, size, found, output + d);
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
