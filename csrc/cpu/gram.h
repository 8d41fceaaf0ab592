// gram: out [D, D] += x^T x for x [T, D], a symmetric product.
//
// Rows are taken 128 at a time and packed, in float, into panels of kPanel columns. The upper
// triangle is computed in register tiles of kRows x kPanel; both operands come from the same
// panels: the one under the tile's columns stays in the first-level cache, those of a strip of 384
// columns in the second. A job is one panel against one strip. The lower triangle is written at the
// end.
#pragma once

namespace gram_detail {
using product::kPanel, product::kRows;
constexpr int kChunk = 128;           // rows of x packed together; _WORKSPACE_ROWS in ops/gram.py
constexpr int kStrip = 384 / kPanel;  // panels of one strip

// All tiles of one panel against the columns [begin, end) that lie at or above its diagonal.
template <typename S>
inline void job(const float* packed, int depth, std::int64_t panel, std::int64_t begin,
                std::int64_t end, S* out, std::int64_t channels) {
  const std::int64_t first = panel * kPanel;
  const int columns = int(std::min<std::int64_t>(kPanel, channels - first));
  end = std::min({end, first + kPanel, channels});
  for (std::int64_t i = begin; i < end; i += kRows) {
    const product::Left left = {packed + i / kPanel * kPanel * kChunk + i % kPanel, 1, kPanel};
    const int rows = int(std::min<std::int64_t>(kRows, end - i));
    product::narrow_tile(left, rows, packed + first * kChunk, kPanel, depth, true,
                         out + i * channels + first, channels, columns);
  }
}

// Copies the upper triangle to the lower one, in blocks that fit the first-level cache.
template <typename S>
inline void mirror(S* out, std::int64_t channels, std::int64_t begin) {
  constexpr std::int64_t kBlock = 32;
  const std::int64_t end = std::min(begin + kBlock, channels);
  for (std::int64_t left = 0; left <= begin; left += kBlock)
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t j = left; j < std::min(left + kBlock, i); ++j)
        out[i * channels + j] = out[j * channels + i];
}

template <typename X, typename S>
inline void run(const X* x, std::int64_t tokens, std::int64_t channels, std::int64_t stride,
                const std::int64_t* kept, S* out, float* packed, int threads) {
  const std::int64_t panels = (channels + kPanel - 1) / kPanel;
  const std::int64_t strips = (panels + kStrip - 1) / kStrip;
#pragma omp parallel num_threads(threads)
  {
    for (std::int64_t first = 0; first < tokens; first += kChunk) {
      const int depth = int(std::min<std::int64_t>(kChunk, tokens - first));
#pragma omp for schedule(static)
      for (std::int64_t p = 0; p < panels; ++p) {
        const int columns = int(std::min<std::int64_t>(kPanel, channels - p * kPanel));
        product::pack(x + p * kPanel, stride, kept, first, depth, columns,
                      packed + p * kPanel * kChunk);
      }
      // A tile is always summed in the same order, whichever thread takes the job.
#pragma omp for schedule(dynamic)
      for (std::int64_t n = 0; n < strips * panels; ++n) {
        const std::int64_t begin = n / panels * kStrip * kPanel, panel = n % panels;
        if ((panel + 1) * kPanel > begin)
          job(packed, depth, panel, begin, begin + kStrip * kPanel, out, channels);
      }
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < channels; i += 32) mirror(out, channels, i);
  }
}
}  // namespace gram_detail

inline void gram(address x, int x_dtype, std::int64_t tokens, std::int64_t channels,
                 std::int64_t stride, address kept, address out, int out_dtype, address workspace,
                 int threads) {
  with_float(x_dtype, x, [&](auto* typed) {
    const auto* rows = as<const std::int64_t>(kept);
    float* packed = as<float>(workspace);
    if (static_cast<DType>(out_dtype) == DType::f64)
      gram_detail::run(typed, tokens, channels, stride, rows, as<double>(out), packed, threads);
    else
      gram_detail::run(typed, tokens, channels, stride, rows, as<float>(out), packed, threads);
  });
}
