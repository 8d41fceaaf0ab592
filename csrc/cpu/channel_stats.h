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

// sum + v, on the ports of multiplication at AVX2: those of addition are busy with the rest. By an
// addition bfloat16 takes 1.25 times as long there.
inline F plus(F sum, F v) {
#if defined(TAILOR_AVX2)
  F one = F::set(1);
  asm("" : "+x"(one.v));  // known to be one, it would be an addition
  return fma(v, one, sum);
#else
  return sum + v;
#endif
}

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

// A vector's worth of columns of a row. At AVX2 that is a whole vector of bfloat16, taken apart by
// the parity of the columns: a shift and a mask, where widening takes four instructions.
template <typename X>
struct Piece {
#if defined(TAILOR_AVX2) && !defined(TAILOR_AVX512)
  static constexpr bool kParity = std::is_same_v<X, bf16>;
#else
  static constexpr bool kParity = false;
#endif
  static constexpr int kVectors = kParity ? 2 : 1;
  static constexpr std::int64_t kColumns = kVectors * F::width;
  F v[kVectors];

  static Piece load(const X* p) {
#if defined(TAILOR_AVX2) && !defined(TAILOR_AVX512)
    if constexpr (kParity) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)p), odd = _mm256_set1_epi32(~0xffff);
      return {{{_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))},
               {_mm256_castsi256_ps(_mm256_and_si256(both, odd))}}};
    }
#endif
    return {{F::load(p)}};
  }
  static Piece load_part(const X* p, std::int64_t columns) {
    X lanes[kColumns] = {};
    std::copy_n(p, columns, lanes);
    return load(lanes);
  }
  static std::int64_t column(int i, int lane) { return kParity ? 2 * lane + i : lane; }
};

// The sums of a Piece of columns lie side by side.
template <typename X>
struct Sums {
  static constexpr int kVectors = Piece<X>::kVectors;
  float values[kSums][kVectors][F::width];

  template <int count, typename Load>
  void add(Load&& load) {
    F sum[kVectors], squares[kVectors], absolutes[kVectors], maximum[kVectors];
    for (int i = 0; i < kVectors; ++i) sum[i] = squares[i] = absolutes[i] = maximum[i] = F::zero();
#pragma GCC unroll 12
    for (int r = 0; r < count; ++r) {
      const Piece<X> piece = load(r);
      for (int i = 0; i < kVectors; ++i) {
        const F v = piece.v[i], a = abs(v);
        sum[i] = plus(sum[i], v), squares[i] = fma(v, v, squares[i]);
        absolutes[i] = absolutes[i] + a, maximum[i] = max(maximum[i], a);
      }
    }
    for (int i = 0; i < kVectors; ++i) {
      (F::load(values[kSum][i]) + sum[i]).store(values[kSum][i]);
      (F::load(values[kSquares][i]) + squares[i]).store(values[kSquares][i]);
      (F::load(values[kAbsolutes][i]) + absolutes[i]).store(values[kAbsolutes][i]);
      max(F::load(values[kMaximum][i]), maximum[i]).store(values[kMaximum][i]);
    }
  }
};

// Adds `count` rows, and fetches what follows them: further columns, and at last `later` rows.
template <int count, typename X>
inline void add_rows(const X* const* rows, const X* const* later, std::int64_t columns,
                     Sums<X>* sums) {
  constexpr std::int64_t kAhead = 1024 / sizeof(X), kStep = Piece<X>::kColumns;
  std::int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
    const bool here = c + kAhead < columns;
    const X* const* from = here ? rows : later;
    const std::int64_t at = here ? c + kAhead : c + kAhead - columns;
    (sums++)->template add<count>([&](int r) {
      __builtin_prefetch(from[r] + at);
      return Piece<X>::load(rows[r] + c);
    });
  }
  if (c < columns)
    sums->template add<count>([&](int r) { return Piece<X>::load_part(rows[r] + c, columns - c); });
}

template <typename X, typename S>
inline void flush(Sums<X>* sums, std::int64_t columns, S* stats, std::int64_t channels) {
  for (std::int64_t c = 0; c < columns; c += Piece<X>::kColumns, ++sums) {
    for (int i = 0; i < Piece<X>::kVectors; ++i)
      for (int l = 0; l < F::width; ++l) {
        const std::int64_t to = c + Piece<X>::column(i, l);
        if (to >= columns) continue;
        const auto value = [&](int k) { return sums->values[k][i][l]; };
        for (int k = kSum; k < kMaximum; ++k) stats[(k + 1) * channels + to] += S(value(k));
        // The vector maximum loses NaN; the sum of absolutes is NaN where a value was, and only
        // there.
        const S largest =
            value(kAbsolutes) == value(kAbsolutes) ? value(kMaximum) : value(kAbsolutes);
        S& maximum = stats[4 * channels + to];
        maximum = maximum >= largest || maximum != maximum ? maximum : largest;
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
  Sums<X> sums[kTile / Piece<X>::kColumns];
  std::fill_n(sums, (columns + Piece<X>::kColumns - 1) / Piece<X>::kColumns, Sums<X>{});
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
