// channel_stats: count, sum, sum of squares, sum of absolutes and absolute maximum of each column
// of x [T, D], added to stats [5, D].
//
// One read of x. A thread owns a band of columns, so nothing is shared: it walks down the rows with
// a block of columns in registers, and flushes to the caller's accumulator every `kFlush` rows, so
// that a float sum never runs over more than that many terms.
#pragma once

namespace stats_detail {
constexpr int kBlock = 2 * F::width;  // columns in registers: 2 x 4 accumulators
constexpr std::int64_t kFlush = 512;  // rows summed in float between two flushes

template <typename X, typename S>
inline void scalar_column(const X* x, std::int64_t rows, std::int64_t stride, const bool* mask,
                          S* s, std::int64_t channels) {
  S sum = 0, squares = 0, absolutes = 0, maximum = 0;
  for (std::int64_t t = 0; t < rows; ++t) {
    if (mask && !mask[t]) continue;
    S v;
    if constexpr (std::is_same_v<X, double>)
      v = S(x[t * stride]);
    else
      v = S(to_float(x[t * stride]));
    sum += v, squares += v * v, absolutes += std::abs(v), maximum = std::max(maximum, std::abs(v));
  }
  s[1 * channels] += sum, s[2 * channels] += squares, s[3 * channels] += absolutes;
  s[4 * channels] = std::max(s[4 * channels], maximum);
}

template <typename X, typename S>
inline void vector_block(const X* x, std::int64_t rows, std::int64_t stride, const bool* mask, S* s,
                         std::int64_t channels) {
  F sum[2], squares[2], absolutes[2], maximum[2];
  for (int j = 0; j < 2; ++j) sum[j] = squares[j] = absolutes[j] = maximum[j] = F::zero();
  for (std::int64_t t = 0; t < rows; ++t) {
    if (mask && !mask[t]) continue;
    for (int j = 0; j < 2; ++j) {
      const F v = F::load(x + t * stride + j * F::width), a = abs(v);
      sum[j] = sum[j] + v;
      squares[j] = fma(v, v, squares[j]);
      absolutes[j] = absolutes[j] + a;
      maximum[j] = max(maximum[j], a);
    }
  }
  float lanes[4][kBlock];
  for (int j = 0; j < 2; ++j) {
    sum[j].store(lanes[0] + j * F::width), squares[j].store(lanes[1] + j * F::width);
    absolutes[j].store(lanes[2] + j * F::width), maximum[j].store(lanes[3] + j * F::width);
  }
  for (int c = 0; c < kBlock; ++c) {
    for (int k = 0; k < 3; ++k) s[(k + 1) * channels + c] += S(lanes[k][c]);
    s[4 * channels + c] = std::max(s[4 * channels + c], S(lanes[3][c]));
  }
}

template <typename X, typename S>
inline void run(const X* x, std::int64_t rows, std::int64_t channels, std::int64_t stride,
                const bool* mask, S* stats, int threads) {
  std::int64_t counted = rows;
  if (mask) counted = std::count(mask, mask + rows, true);
  const std::int64_t blocks = (channels + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t begin = b * kBlock, end = std::min(begin + kBlock, channels);
    for (std::int64_t c = begin; c < end; ++c) stats[c] += S(counted);
    for (std::int64_t t = 0; t < rows; t += kFlush) {
      const std::int64_t part = std::min(kFlush, rows - t);
      const bool* m = mask ? mask + t : nullptr;
      if constexpr (!std::is_same_v<X, double>) {
        if (end - begin == kBlock) {
          vector_block(x + t * stride + begin, part, stride, m, stats + begin, channels);
          continue;
        }
      }
      for (std::int64_t c = begin; c < end; ++c)
        scalar_column(x + t * stride + c, part, stride, m, stats + c, channels);
    }
  }
}
}  // namespace stats_detail

inline void channel_stats(address x, int x_dtype, std::int64_t rows, std::int64_t channels,
                          std::int64_t stride, address mask, address stats, int stats_dtype,
                          int threads) {
  with_dtype(x_dtype, x, [&](auto* typed) {
    const bool* m = as<const bool>(mask);
    if (static_cast<DType>(stats_dtype) == DType::f64)
      stats_detail::run(typed, rows, channels, stride, m, as<double>(stats), threads);
    else
      stats_detail::run(typed, rows, channels, stride, m, as<float>(stats), threads);
  });
}
