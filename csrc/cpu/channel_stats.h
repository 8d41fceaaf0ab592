// channel_stats: count, sum, sum of squares, sum of absolutes and absolute maximum of each column
// of x [T, D], added to stats [5, D].
//
// One read of x. A thread owns a tile of columns, so nothing is shared. It walks through several
// equal parts of the rows side by side, because a processor fetches ahead what is read in the order
// of memory, and only that: eight neighbouring rows at a time ran at 19-25 GB/s where six far ones
// run at 31-33 and a plain read at 37 (one thread, 576 to 4096 columns). Their values are summed in
// registers, a few hundred rows in float in the caches, and then in the caller's accumulator: no
// float sum is longer than 12 + 32 additions.
#pragma once

namespace stats_detail {
constexpr int kFlush = 32;            // steps summed in float between two flushes
constexpr std::int64_t kTile = 4096;  // columns of one tile: its float sums take 64 KB of stack
enum { kSum, kSquares, kAbsolutes, kMaximum, kSums };

// The rows that count, one after another.
template <typename X>
struct Rows {
  const X* x;
  std::int64_t stride;
  const bool* mask;
  std::int64_t next;

  const X* take() {
    while (mask && !mask[next]) ++next;
    return x + next++ * stride;
  }
  void skip(std::int64_t rows) {
    if (!mask) next += rows;
    for (; mask && rows > 0; --rows) take();
  }
};

// A vector's worth of columns: its sums lie side by side.
struct Sums {
  float values[kSums][F::width];

  template <int count, typename Load>
  void add(Load&& load) {
    F sum = F::zero(), squares = F::zero(), absolutes = F::zero(), maximum = F::zero();
#pragma GCC unroll 12
    for (int r = 0; r < count; ++r) {
      const F v = load(r), a = abs(v);
      sum = sum + v, squares = fma(v, v, squares), absolutes = absolutes + a;
      maximum = max(maximum, a);
    }
    (F::load(values[kSum]) + sum).store(values[kSum]);
    (F::load(values[kSquares]) + squares).store(values[kSquares]);
    (F::load(values[kAbsolutes]) + absolutes).store(values[kAbsolutes]);
    max(F::load(values[kMaximum]), maximum).store(values[kMaximum]);
  }
};

// Adds `count` rows, and fetches what follows them: further columns, and at last `later` rows.
template <int count, typename X>
inline void add_rows(const X* const* rows, const X* const* later, std::int64_t columns,
                     Sums* sums) {
  constexpr std::int64_t kAhead = 1024 / sizeof(X);
  std::int64_t c = 0;
  for (; c + F::width <= columns; c += F::width)
    (sums++)->add<count>([&](int r) {
      const std::int64_t ahead = c + kAhead;
      __builtin_prefetch(ahead < columns ? rows[r] + ahead : later[r] + (ahead - columns));
      return F::load(rows[r] + c);
    });
  if (c < columns)
    sums->add<count>([&](int r) { return load_part(rows[r] + c, int(columns - c), F::zero()); });
}

template <typename S>
inline void flush(Sums* sums, std::int64_t columns, S* stats, std::int64_t channels) {
  for (std::int64_t c = 0; c < columns; c += F::width, ++sums) {
    const int lanes = int(std::min<std::int64_t>(F::width, columns - c));
    for (int k = kSum; k < kMaximum; ++k)
      for (int l = 0; l < lanes; ++l) stats[(k + 1) * channels + c + l] += S(sums->values[k][l]);
    for (int l = 0; l < lanes; ++l) {
      // The vector maximum loses NaN; the sum of absolutes is NaN where a value was, and only
      // there.
      const float absolutes = sums->values[kAbsolutes][l];
      const float largest = absolutes == absolutes ? sums->values[kMaximum][l] : absolutes;
      S& to = stats[4 * channels + c + l];
      to = to >= S(largest) || to != to ? to : S(largest);
    }
    *sums = {};
  }
}

template <typename X, typename S>
inline void tile(Rows<X> rows, std::int64_t counted, std::int64_t columns, S* stats,
                 std::int64_t channels) {
  // Six rows of float32, twelve of 16 bits. Powers of two, as distances of even numbers of rows,
  // are up to a third slower: the parts then share a few sets of the caches.
  constexpr int kParts = 24 / sizeof(X);
  const std::int64_t steps = (counted / kParts - 1) | 1;  // odd, -1 for none
  Sums sums[kTile / F::width];
  std::fill_n(sums, (columns + F::width - 1) / F::width, Sums{});
  Rows<X> parts[kParts];
  const X *now[kParts], *later[kParts];
  for (int r = 0; r < kParts && steps > 0; ++r) {
    parts[r] = rows, now[r] = parts[r].take();
    rows.skip(steps);
  }
  for (std::int64_t step = 1; step <= steps; ++step) {
    for (int r = 0; r < kParts; ++r) later[r] = step < steps ? parts[r].take() : now[r];
    add_rows<kParts>(now, later, columns, sums);
    std::copy_n(later, kParts, now);
    if (step % kFlush == 0) flush(sums, columns, stats, channels);
  }
  std::int64_t left = counted - kParts * std::max<std::int64_t>(steps, 0);
  for (; left >= kParts; left -= kParts) {
    for (const X*& row : now) row = rows.take();
    add_rows<kParts>(now, now, columns, sums);
  }
  for (; left > 0; --left) {
    now[0] = rows.take();
    add_rows<1>(now, now, columns, sums);
  }
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
    tile(Rows<X>{x + begin, stride, mask, 0}, counted, columns, stats + begin, channels);
  }
}
}  // namespace stats_detail

inline void channel_stats(address x, int x_dtype, std::int64_t rows, std::int64_t channels,
                          std::int64_t stride, address mask, address stats, int stats_dtype,
                          int threads) {
  with_float(x_dtype, x, [&](const auto* typed) {
    const bool* m = as<const bool>(mask);
    if (static_cast<DType>(stats_dtype) == DType::f64)
      stats_detail::run(typed, rows, channels, stride, m, as<double>(stats), threads);
    else
      stats_detail::run(typed, rows, channels, stride, m, as<float>(stats), threads);
  });
}
