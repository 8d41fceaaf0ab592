// channel_stats: count, sum, sum of squares, sum of absolutes and absolute maximum of each column
// of x [T, D], added to stats [5, D].
//
// One read of x, in the order in which it lies in memory. A thread owns a tile of columns, so
// nothing is shared. Eight rows at a time are summed in registers, a few hundred in float in the
// first-level cache, and then they go to the caller's accumulator: no float sum is longer than
// 8 + 32 additions.
#pragma once

namespace stats_detail {
constexpr int kGroup = 8;             // rows read side by side
constexpr int kFlush = 32;            // groups summed in float between two flushes
constexpr std::int64_t kTile = 1024;  // columns of one tile: its float sums take 16 KB of stack
enum { kSum, kSquares, kAbsolutes, kMaximum, kSums };

template <typename X>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <int group, typename X>
inline void vector_columns(const X* const* rows, std::int64_t ahead, std::int64_t c,
                           float (*sums)[kTile]) {
  F sum = F::zero(), squares = F::zero(), absolutes = F::zero(), maximum = F::zero();
#pragma GCC unroll 8
  for (int r = 0; r < group; ++r) {
    __builtin_prefetch(rows[r] + c + ahead);
    const F v = F::load(rows[r] + c), a = abs(v);
    sum = sum + v, squares = fma(v, v, squares), absolutes = absolutes + a;
    maximum = max(maximum, a);
  }
  (F::load(sums[kSum] + c) + sum).store(sums[kSum] + c);
  (F::load(sums[kSquares] + c) + squares).store(sums[kSquares] + c);
  (F::load(sums[kAbsolutes] + c) + absolutes).store(sums[kAbsolutes] + c);
  max(F::load(sums[kMaximum] + c), maximum).store(sums[kMaximum] + c);
}

template <int group, typename X, typename A>
inline void add_rows(const X* const* rows, std::int64_t ahead, std::int64_t columns,
                     A (*sums)[kTile]) {
  std::int64_t c = 0;
  if constexpr (std::is_same_v<A, float>)
    for (; c + F::width <= columns; c += F::width) vector_columns<group>(rows, ahead, c, sums);
  for (; c < columns; ++c) {
    A sum = 0, squares = 0, absolutes = 0, maximum = 0;
    for (int r = 0; r < group; ++r) {
      const A v = to_float(rows[r][c]), a = std::abs(v);
      sum += v, squares += v * v, absolutes += a, maximum = std::max(maximum, a);
    }
    sums[kSum][c] += sum, sums[kSquares][c] += squares, sums[kAbsolutes][c] += absolutes;
    sums[kMaximum][c] = std::max(sums[kMaximum][c], maximum);
  }
}

template <typename A, typename S>
inline void flush(A (*sums)[kTile], std::int64_t columns, S* stats, std::int64_t channels) {
  for (int k = kSum; k < kMaximum; ++k)
    for (std::int64_t c = 0; c < columns; ++c) stats[(k + 1) * channels + c] += S(sums[k][c]);
  for (std::int64_t c = 0; c < columns; ++c) {
    // The vector maximum loses NaN; the sum of absolutes is NaN where a value was, and only there.
    const A absolutes = sums[kAbsolutes][c];
    const A maximum = absolutes == absolutes ? sums[kMaximum][c] : absolutes;
    S& to = stats[4 * channels + c];
    to = to >= S(maximum) || to != to ? to : S(maximum);
  }
  for (int k = 0; k < kSums; ++k) std::fill_n(sums[k], columns, A(0));
}

template <typename X, typename S>
inline void tile(const X* x, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                 const bool* mask, S* stats, std::int64_t channels) {
  using A = typename Accumulator<X>::type;
  A sums[kSums][kTile];
  for (int k = 0; k < kSums; ++k) std::fill_n(sums[k], columns, A(0));
  const X* group[kGroup];
  int filled = 0, groups = 0;
  for (std::int64_t t = 0; t < rows; ++t) {
    if (mask && !mask[t]) continue;
    group[filled++] = x + t * stride;
    if (filled < kGroup) continue;
    add_rows<kGroup>(group, kGroup * stride, columns, sums);
    filled = 0;
    if (++groups % kFlush == 0) flush(sums, columns, stats, channels);
  }
  for (int r = 0; r < filled; ++r) add_rows<1>(group + r, 0, columns, sums);
  flush(sums, columns, stats, channels);
}

template <typename X, typename S>
inline void run(const X* x, std::int64_t rows, std::int64_t channels, std::int64_t stride,
                const bool* mask, S* stats, int threads) {
  std::int64_t counted = rows;
  if (mask) counted = std::count(mask, mask + rows, true);
  for (std::int64_t c = 0; c < channels; ++c) stats[c] += S(counted);
  // As many tiles as threads where that is possible; whole cache lines each.
  const std::int64_t share = ((channels + threads - 1) / threads + 31) / 32 * 32;
  const std::int64_t width = std::min(share, kTile);
  const std::int64_t tiles = width ? (channels + width - 1) / width : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t b = 0; b < tiles; ++b) {
    const std::int64_t begin = b * width, columns = std::min(width, channels - begin);
    tile(x + begin, rows, columns, stride, mask, stats + begin, channels);
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
