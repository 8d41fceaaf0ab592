// int8_quantize: symmetric codes of each row of a weight [N, K], one scale a row; and what the
// three quantizing ops share.
//
// The rules are those of tailor_engine/ops/_quantize.py, operation by operation in float32, so that
// codes and scales equal the reference bit for bit (no fast-math: division and rounding are
// IEEE's; a reciprocal with two exact corrections was no faster than a vector's division). A weight
// is a sequence of groups. Of so many groups as fit the first-level cache first all extremes are
// found, then all steps, a vector of groups at a time, then all codes.
#pragma once

namespace quantize_detail {
constexpr int kBatch = 64;                   // groups whose steps are found together, and
constexpr std::int64_t kBatchValues = 4096;  // their values, unless one group alone has more

struct Format {
  int bits;
  bool symmetric;
};

struct Batch {
  float low[kBatch], high[kBatch], scale[kBatch], zero[kBatch];
  f16 half[kBatch];  // the scales of 4 bits, as they are stored
};

// Calls use(vector, place, lanes) on n values; a last vector in part is filled up with its first.
template <typename X, typename Use>
inline void each_vector(const X* x, std::int64_t n, Use&& use) {
  std::int64_t k = 0;
  for (; k + F::width <= n; k += F::width) use(F::load(x + k), k, F::width);
  if (k < n) use(load_part(x + k, int(n - k), F::set(to_float(x[k]))), k, int(n - k));
}

// The extremes of a group, or, where only their size counts, the largest size both ways. `poison`
// becomes NaN where a value is not finite: min and max lose NaN.
template <bool symmetric, typename X>
inline void extremes(const X* x, std::int64_t n, float& lowest, float& highest, F& poison) {
  F low = F::set(to_float(x[0])), high = symmetric ? abs(low) : low;
  each_vector(x, n, [&](F v, std::int64_t, int) {
    if constexpr (!symmetric) low = min(low, v);
    high = max(high, symmetric ? abs(v) : v);
    poison = fma(v, F::zero(), poison);
  });
  highest = high.maximum();
  lowest = -(symmetric ? highest : (F::zero() - low).maximum());
}

// The extremes of consecutive groups, times the clip ratios (not negative); NaN where a value is.
template <typename X>
inline void extremes(const X* x, std::int64_t group, int count, const float* clip, bool symmetric,
                     Batch& b) {
  F poison = F::zero();
  for (int i = 0; i < count; ++i)
    symmetric ? extremes<true>(x + i * group, group, b.low[i], b.high[i], poison)
              : extremes<false>(x + i * group, group, b.low[i], b.high[i], poison);
  const bool finite = poison.sum() == 0;
  for (int i = 0; i < count; ++i) {
    for (std::int64_t k = 0; k < group && !finite; ++k) {
      const float v = to_float(x[i * group + k]);
      if (v != v) b.low[i] = b.high[i] = v;
    }
    if (clip) b.low[i] *= clip[i], b.high[i] *= clip[i];
  }
}

// Half to even, by adding 1.5 x 2^23; -0 becomes 0.
inline F rounded(F x) {
  const F rounder = F::set(12582912.0f);
  return (x + rounder) - rounder;
}

// int8_scale and int4_scale of _quantize.py. Where an operand is NaN, min and max give the second.
inline void steps(Batch& b, int count, Format format) {
  for (int i = 0; i < count; i += F::width) {
    F low = F::load(b.low + i), high = F::load(b.high + i), step;
    if (format.symmetric) {
      step = max(F::zero() - low, high) / F::set(format.bits == 4 ? 7.0f : 127.0f);
    } else {
      low = min(F::zero(), low), high = max(F::zero(), high);  // so that 0 itself stays exact
      step = (high - low) / F::set(15.0f);
    }
    if (format.bits == 4) {
      min(F::set(65504.0f), step).store(b.half + i);
      step = F::load(b.half + i);
    }
    const F one = F::set(1.0f), size = abs(step);
    step = if_less(F::zero(), size, step, if_less(size, one, one, step));  // 0 becomes 1
    step.store(b.scale + i);
    if (format.bits == 4) step.store(b.half + i);
    F zero = F::set(format.bits == 4 ? 8.0f : 0.0f);
    if (!format.symmetric) {
      zero = rounded(min(F::set(15.0f), max(F::zero(), (F::zero() - low) / step)));
    }
    zero.store(b.zero + i);
  }
}

// Calls write(x of a group, its number, its place in the batch, batch) for all groups of a dense
// weight, with their steps found.
template <typename X, typename Write>
inline void each_group(const X* x, std::int64_t groups, std::int64_t group, const float* clip,
                       Format format, int threads, Write&& write) {
  const std::int64_t size =
      std::min<std::int64_t>(kBatch, std::max<std::int64_t>(1, kBatchValues / group));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t first = 0; first < groups; first += size) {
    const int count = int(std::min(size, groups - first));
    Batch b = {};
    extremes(x + first * group, group, count, clip ? clip + first : nullptr, format.symmetric, b);
    steps(b, count, format);
    for (int i = 0; i < count; ++i) write(x + (first + i) * group, first + i, i, b);
  }
}

// Values in units of their step, within [floor, ceiling]; clamping before rounding gives the same
// integers. NaN stays.
inline F scaled(F v, F step, F floor, F ceiling) { return min(ceiling, max(floor, v / step)); }
}  // namespace quantize_detail

inline void int8_quantize(address weight, int dtype, std::int64_t rows, std::int64_t width,
                          address clip, address data, address scale, int threads) {
  using namespace quantize_detail;
  advise_huge_pages(as<void>(data), rows * width);
  const auto write = [&](const auto* x, std::int64_t row, float step) {
    const F divisor = F::set(step);
    std::int8_t* out = as<std::int8_t>(data) + row * width;
    each_vector(x, width, [&](F v, std::int64_t k, int lanes) {
      if (lanes == F::width) return quantized::store_codes(v / divisor, out + k);
      std::int8_t codes[F::width];
      quantized::store_codes(v / divisor, codes);
      std::memcpy(out + k, codes, lanes);
    });
    as<float>(scale)[row] = step;
  };
  with_float(dtype, weight, [&](const auto* x) {
    each_group(
        x, rows, width, as<const float>(clip), {8, true}, threads,
        [&](const auto* row, std::int64_t n, int i, const Batch& b) { write(row, n, b.scale[i]); });
  });
}
