// causal_attention: softmax(scale q k^T) v, where a query sees the keys up to its own place; heads
// share keys and values in groups. Keys come in blocks, and the softmax is corrected as its maximum
// grows (Milakov and Gimelshein, arXiv 1805.02867), so that no [T, S] matrix is held.
#pragma once

namespace attention_detail {
constexpr int kKeys = 64;         // keys of a block
constexpr int kRows = 6;          // rows of a tile of products: 24 of 32 registers with AVX-512
constexpr int kValues = 12288;    // room for a task's queries, and for their outputs: 48 KB each
constexpr int kWidth = 256;       // largest head
constexpr float kNever = -1e30f;  // a score that is not there; differences of -inf would be NaN
#if defined(TAILOR_AVX512)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kPanel = kVectors * F::width;

template <typename X>
struct Problem {
  const X *q, *k, *v;
  X* y;
  std::int64_t heads, groups, tokens, keys, width;
  std::int64_t q_strides[3], k_strides[3], v_strides[3];  // batch, head, place
  float scale;

  std::int64_t repeats() const { return heads / groups; }
  const X* key(std::int64_t b, std::int64_t g, std::int64_t s) const {
    return k + b * k_strides[0] + g * k_strides[1] + s * k_strides[2];
  }
  const X* value(std::int64_t b, std::int64_t g, std::int64_t s) const {
    return v + b * v_strides[0] + g * v_strides[1] + s * v_strides[2];
  }
  const X* query(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return q + b * q_strides[0] + h * q_strides[1] + t * q_strides[2];
  }
  X* output(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return y + ((b * tokens + t) * heads + h) * width;
  }
};

// Running softmax of one row: the scores become e^(score - maximum), older sums are scaled down.
struct Softmax {
  float maximum = kNever, sum = 0;

  // Returns the factor for what was summed with the old maximum.
  float add(float* scores, int count) {
    F top = F::set(maximum);
    for (int s = 0; s < count; s += F::width) top = max(top, F::load(scores + s));
    const float before = maximum;
    maximum = top.maximum();
    F total = F::zero();
    for (int s = 0; s < count; s += F::width) {
      const F e = exp(F::load(scores + s) - F::set(maximum));
      e.store(scores + s);
      total = total + e;
    }
    const float factor = std::exp(before - maximum);
    sum = sum * factor + total.sum();
    return factor;
  }
};

// c[R][kPanel] = a[R][depth] b[depth][kPanel] (+ c)
template <int R>
inline void tile(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                 float* c, std::int64_t c_stride, std::int64_t depth, bool add) {
  F sums[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kVectors; ++j)
      sums[r][j] = add ? F::load(c + r * c_stride + j * F::width) : F::zero();
  for (std::int64_t d = 0; d < depth; ++d) {
    F row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = F::load(b + d * b_stride + j * F::width);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const F x = F::set(a[r * a_stride + d]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] = fma(x, row[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kVectors; ++j) sums[r][j].store(c + r * c_stride + j * F::width);
}

template <int R>
inline void product(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                    float* c, std::int64_t c_stride, std::int64_t depth, std::int64_t columns,
                    bool add) {
  for (std::int64_t n = 0; n < columns; n += kPanel)
    tile<R>(a, a_stride, b + n, b_stride, c + n, c_stride, depth, add);
}

// Some tokens of some heads of one group against all keys that they see.
template <typename X>
struct Task {
  alignas(64) float queries[kValues];        // [rows][padded], scaled
  alignas(64) float outputs[kValues];        // [rows][padded]
  alignas(64) float keys[kWidth * kKeys];    // [width][kKeys]: transposed
  alignas(64) float values[kKeys * kWidth];  // [kKeys][padded]
  alignas(64) float scores[kRows * kKeys];
  Softmax softmax[kValues / kPanel];

  void run(const Problem<X>& p, std::int64_t b, std::int64_t g, std::int64_t head, int heads,
           std::int64_t token, int tokens) {
    const std::int64_t padded = (p.width + kPanel - 1) / kPanel * kPanel;
    const int rows = heads * tokens;  // row r: token r / heads, head r % heads
    for (int r = 0; r < rows; ++r) {
      const X* x = p.query(b, head + r % heads, token + r / heads);
      for (std::int64_t d = 0; d < p.width; ++d) queries[r * padded + d] = to_float(x[d]) * p.scale;
      std::fill_n(outputs + r * padded, padded, 0.0f);
      softmax[r] = Softmax();
    }
    const std::int64_t first = p.keys - p.tokens + token, seen = first + tokens;
    for (std::int64_t s = 0; s < seen; s += kKeys) {
      const int count = int(std::min<std::int64_t>(kKeys, seen - s));
      pack(p, b, g, s, count, padded);
      for (int r = 0; r < rows;) {
        const int size = std::min(kRows, rows - r);
        quantized::with_rows<kRows>(size, [&](auto constant) {
          block<decltype(constant)::value>(r, heads, first - s, p.width, padded);
        });
        r += size;
      }
    }
    for (int r = 0; r < rows; ++r) {
      X* y = p.output(b, head + r % heads, token + r / heads);
      for (std::int64_t d = 0; d < p.width; ++d)
        y[d] = from_float<X>(outputs[r * padded + d] / softmax[r].sum);
    }
  }

 private:
  void pack(const Problem<X>& p, std::int64_t b, std::int64_t g, std::int64_t s, int count,
            std::int64_t padded) {
    for (int i = 0; i < kKeys; ++i) {
      float* row = values + i * padded;
      if (i >= count) {
        for (std::int64_t d = 0; d < p.width; ++d) keys[d * kKeys + i] = 0;
        std::fill_n(row, padded, 0.0f);
        continue;
      }
      const X *k = p.key(b, g, s + i), *v = p.value(b, g, s + i);
      for (std::int64_t d = 0; d < p.width; ++d) keys[d * kKeys + i] = to_float(k[d]);
      for (std::int64_t d = 0; d < p.width; ++d) row[d] = to_float(v[d]);
      std::fill_n(row + p.width, padded - p.width, 0.0f);
    }
  }

  // `last`: the last key of this block that the task's first token sees; it may lie beyond.
  template <int R>
  void block(int row, int heads, std::int64_t last, std::int64_t width, std::int64_t padded) {
    product<R>(queries + row * padded, padded, keys, kKeys, scores, kKeys, width, kKeys, false);
    for (int r = 0; r < R; ++r) {
      float* of_row = scores + r * kKeys;
      const std::int64_t visible = last + (row + r) / heads + 1;
      for (std::int64_t s = std::max<std::int64_t>(0, visible); s < kKeys; ++s) of_row[s] = kNever;
      if (visible <= 0) {
        std::fill_n(of_row, kKeys, 0.0f);
        continue;
      }
      const F factor = F::set(softmax[row + r].add(of_row, kKeys));
      float* y = outputs + (row + r) * padded;
      for (std::int64_t d = 0; d < padded; d += F::width) (F::load(y + d) * factor).store(y + d);
    }
    product<R>(scores, kKeys, values, padded, outputs + row * padded, padded, kKeys, padded, true);
  }
};

// One token: its keys and values are read once, as they lie, for all heads that share them.
template <typename X>
inline void one_token(const Problem<X>& p, std::int64_t b, std::int64_t g) {
  constexpr int kHeads = 8;
  const std::int64_t whole = p.width / F::width * F::width;
  alignas(64) float query[kHeads][kWidth], output[kHeads][kWidth], scores[kHeads][kKeys];
  for (std::int64_t head = 0; head < p.repeats(); head += kHeads) {
    const int heads = int(std::min<std::int64_t>(kHeads, p.repeats() - head));
    Softmax softmax[kHeads];
    for (int h = 0; h < heads; ++h) {
      const X* x = p.query(b, g * p.repeats() + head + h, 0);
      for (std::int64_t d = 0; d < p.width; ++d) query[h][d] = to_float(x[d]) * p.scale;
      std::fill_n(output[h], p.width, 0.0f);
    }
    for (std::int64_t s = 0; s < p.keys; s += kKeys) {
      const int count = int(std::min<std::int64_t>(kKeys, p.keys - s));
      for (int i = 0; i < count; ++i) {
        const X* k = p.key(b, g, s + i);
        for (int h = 0; h < heads; ++h) {
          F sum = F::zero();
          for (std::int64_t d = 0; d < whole; d += F::width)
            sum = fma(F::load(query[h] + d), F::load(k + d), sum);
          float score = sum.sum();
          for (std::int64_t d = whole; d < p.width; ++d) score += query[h][d] * to_float(k[d]);
          scores[h][i] = score;
        }
      }
      for (int h = 0; h < heads; ++h) {
        std::fill(scores[h] + count, scores[h] + kKeys, kNever);
        const float factor = softmax[h].add(scores[h], kKeys);
        for (std::int64_t d = 0; d < p.width; ++d) output[h][d] *= factor;
      }
      for (int i = 0; i < count; ++i) {
        const X* v = p.value(b, g, s + i);
        for (int h = 0; h < heads; ++h) {
          const F weight = F::set(scores[h][i]);
          for (std::int64_t d = 0; d < whole; d += F::width)
            fma(weight, F::load(v + d), F::load(output[h] + d)).store(output[h] + d);
          for (std::int64_t d = whole; d < p.width; ++d)
            output[h][d] += scores[h][i] * to_float(v[d]);
        }
      }
    }
    for (int h = 0; h < heads; ++h) {
      X* y = p.output(b, g * p.repeats() + head + h, 0);
      for (std::int64_t d = 0; d < p.width; ++d)
        y[d] = from_float<X>(output[h][d] / softmax[h].sum);
    }
  }
}

template <typename X>
inline void run(const Problem<X>& p, std::int64_t batch, int threads) {
  const std::int64_t pairs = batch * p.groups;
  if (p.tokens == 1) {
    const int used = pairs * p.keys * p.width * p.repeats() < 500000 ? 1 : threads;
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (std::int64_t i = 0; i < pairs; ++i) one_token(p, i / p.groups, i % p.groups);
    return;
  }
  const std::int64_t padded = (p.width + kPanel - 1) / kPanel * kPanel;
  const std::int64_t heads = std::min(p.repeats(), kValues / padded);
  const std::int64_t parts = (p.repeats() + heads - 1) / heads;
  const std::int64_t tokens = std::min<std::int64_t>(kKeys, kValues / (padded * heads));
  const std::int64_t blocks = (p.tokens + tokens - 1) / tokens;
#pragma omp parallel num_threads(threads)
  {
    Task<X> task;
    // Late tokens see more keys: the longest first, and to whoever is free.
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < pairs * parts * blocks; ++i) {
      const std::int64_t pair = i % (pairs * parts) / parts, part = i % parts;
      const std::int64_t token = (blocks - 1 - i / (pairs * parts)) * tokens;
      const std::int64_t g = pair % p.groups, head = part * heads;
      task.run(p, pair / p.groups, g, g * p.repeats() + head,
               int(std::min(heads, p.repeats() - head)), token,
               int(std::min(tokens, p.tokens - token)));
    }
  }
}
}  // namespace attention_detail

// q [B, H, T, D], k and v [B, G, S, D], each with strides of batch, head and place, and unit stride
// along D; y [B, T, H, D] contiguous; one dtype (not f64), D at most 256.
inline void causal_attention(address q, address k, address v, int dtype, std::int64_t batch,
                             std::int64_t heads, std::int64_t groups, std::int64_t tokens,
                             std::int64_t keys, std::int64_t width, std::int64_t q0,
                             std::int64_t q1, std::int64_t q2, std::int64_t k0, std::int64_t k1,
                             std::int64_t k2, std::int64_t v0, std::int64_t v1, std::int64_t v2,
                             float scale, address y, int threads) {
  with_dtype(dtype, q, [&](auto* typed) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (!std::is_same_v<X, double>) {
      const attention_detail::Problem<X> p{
          typed, as<const X>(k), as<const X>(v), as<X>(y),     heads,        groups, tokens,
          keys,  width,          {q0, q1, q2},   {k0, k1, k2}, {v0, v1, v2}, scale};
      attention_detail::run(p, batch, threads);
    }
  });
}
