// Float products from packed panels, for the ops that beat a library's: the symmetric product of
// gram and the products around the distillation loss.
//
// A register tile is kRows rows against one panel of up to kPanel columns. The left operand is read
// a scalar at a time, so it needs no packing in either orientation; the right one is a panel
// [depth, kPanel]. Panels stream from the second-level cache at no cost: on Zen 5, 119 GMAC/s a
// thread with 110 KB panels, 109 with panels that fit the first level and are short.
#pragma once

namespace product {
#if defined(TAILOR_AVX512)
constexpr int kRows = 8;  // 24 accumulators of 32 registers
#else
constexpr int kRows = 4;  // 12 accumulators of 16 registers
#endif
constexpr int kVectors = 3, kPanel = kVectors * F::width;
// Terms of one running sum. A sum of 576 in one go has 2.5 times the error of a library's product,
// which is more than an op is allowed.
constexpr int kRun = 128;

// The left operand: element (row, k) stands at data[row * row_stride + k * depth_stride].
struct Left {
  const float* data;
  std::int64_t row_stride, depth_stride;

  Left from(std::int64_t row, std::int64_t k) const {
    return {data + row * row_stride + k * depth_stride, row_stride, depth_stride};
  }
};

template <typename S>
inline void store(F x, bool add, S* out, int columns) {
  if (std::is_same_v<S, float> && columns >= F::width) {
    float* to = reinterpret_cast<float*>(out);
    (add ? F::load(to) + x : x).store(to);
    return;
  }
  float lanes[F::width];
  x.store(lanes);
  for (int c = 0; c < std::min(columns, F::width); ++c)
    out[c] = (add ? out[c] : S(0)) + S(lanes[c]);
}

// out [rows, columns] = or += left [rows, depth] * panel [depth, columns], rows <= kRows.
// Never inlined: a call costs nothing beside it, and its callers are many.
template <int vectors, typename S>
[[gnu::noinline]] void tile(Left left, int rows, const float* panel, std::int64_t panel_stride,
                            int depth, bool add, S* out, std::int64_t stride, int columns) {
  F sums[kRows][vectors];
  std::int64_t offset[kRows];  // rows behind the last repeat it and are not stored
  for (int r = 0; r < kRows; ++r) {
    offset[r] = std::min(r, rows - 1) * left.row_stride;
    // The output is asked for now and arrives while the products run.
    for (int v = 0; v < vectors; ++v)
      __builtin_prefetch(out + std::min(r, rows - 1) * stride + v * F::width, 1);
  }
  const float* a = left.data;
  int begin = 0;
  do {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < vectors; ++v) sums[r][v] = F::zero();
    const int end = std::min(begin + kRun, depth);
    for (int k = begin; k < end; ++k, a += left.depth_stride, panel += panel_stride) {
      F right[vectors];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) right[v] = F::load(panel + v * F::width);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F one = F::set(a[offset[r]]);
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) sums[r][v] = fma(one, right[v], sums[r][v]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v)
        store(sums[r][v], add || begin > 0, out + r * stride + v * F::width,
              columns - v * F::width);
  } while ((begin += kRun) < depth);
}

// The tile that is just wide enough for `columns`.
template <typename S>
inline void narrow_tile(Left left, int rows, const float* panel, std::int64_t panel_stride,
                        int depth, bool add, S* out, std::int64_t stride, int columns) {
  static_assert(kVectors == 3);
  if (columns > 2 * F::width)
    tile<3>(left, rows, panel, panel_stride, depth, add, out, stride, columns);
  else if (columns > F::width)
    tile<2>(left, rows, panel, panel_stride, depth, add, out, stride, columns);
  else
    tile<1>(left, rows, panel, panel_stride, depth, add, out, stride, columns);
}

// Packs `depth` rows of x into one panel; columns beyond the last one become zeros.
template <typename X>
inline void pack(const X* x, std::int64_t stride, const std::int64_t* kept, std::int64_t first,
                 std::int64_t depth, int columns, float* to) {
  for (std::int64_t k = 0; k < depth; ++k, to += kPanel) {
    const X* row = x + (kept ? kept[first + k] : first + k) * stride;
    int c = 0;
    for (; c + F::width <= columns; c += F::width) F::load(row + c).store(to + c);
    for (; c < columns; ++c) to[c] = to_float(row[c]);
    for (; c < kPanel; ++c) to[c] = 0;
  }
}

// Packs up to kPanel rows of x as the columns of one panel [depth, kPanel].
template <typename X>
inline void pack_transposed(const X* x, std::int64_t stride, int rows, std::int64_t depth,
                            float* to) {
  for (std::int64_t k = 0; k < depth; ++k, to += kPanel)
    for (int r = 0; r < kPanel; ++r) to[r] = r < rows ? to_float(x[r * stride + k]) : 0;
}
}  // namespace product
