// block_influence: cosine and norms of the rows of x and y [T, D] into rows [3, T]; their sums and
// the count are added to totals [4]. One read of both.
#pragma once

namespace influence_detail {
struct Products {
  double xy, xx, yy;
};

template <typename X>
inline Products products(const X* x, const X* y, std::int64_t channels) {
  constexpr int kStreams = 4;  // independent sums hide the latency of an addition
  F xy[kStreams], xx[kStreams], yy[kStreams];
  for (int j = 0; j < kStreams; ++j) xy[j] = xx[j] = yy[j] = F::zero();
  std::int64_t c = 0;
  for (; c + kStreams * F::width <= channels; c += kStreams * F::width) {
#pragma GCC unroll 4
    for (int j = 0; j < kStreams; ++j) {
      const F a = F::load(x + c + j * F::width), b = F::load(y + c + j * F::width);
      xy[j] = fma(a, b, xy[j]), xx[j] = fma(a, a, xx[j]), yy[j] = fma(b, b, yy[j]);
    }
  }
  for (; c < channels; c += F::width) {
    const int n = int(std::min<std::int64_t>(F::width, channels - c));
    const F a = load_part(x + c, n, F::zero()), b = load_part(y + c, n, F::zero());
    xy[0] = fma(a, b, xy[0]), xx[0] = fma(a, a, xx[0]), yy[0] = fma(b, b, yy[0]);
  }
  const auto total = [](const F* s) { return ((s[0] + s[1]) + (s[2] + s[3])).sum(); };
  return {total(xy), total(xx), total(yy)};
}

inline Products products(const double* x, const double* y, std::int64_t channels) {
  Products p = {0, 0, 0};
  for (std::int64_t c = 0; c < channels; ++c)
    p.xy += x[c] * y[c], p.xx += x[c] * x[c], p.yy += y[c] * y[c];
  return p;
}

template <typename X, typename R>
inline void run(const X* x, const X* y, std::int64_t tokens, std::int64_t channels,
                std::int64_t x_stride, std::int64_t y_stride, const bool* mask, double* totals,
                R* rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < tokens; ++t) {
    double cosine = 0, norm_x = 0, norm_y = 0;
    if (!mask || mask[t]) {
      const Products p = products(x + t * x_stride, y + t * y_stride, channels);
      norm_x = std::sqrt(p.xx), norm_y = std::sqrt(p.yy);
      const double norms = norm_x * norm_y;
      cosine = norms == 0 ? 0 : p.xy / norms;
    }
    rows[t] = R(cosine), rows[tokens + t] = R(norm_x), rows[2 * tokens + t] = R(norm_y);
  }
  // In the order of the rows, so that the sums do not depend on the number of threads.
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (mask && !mask[t]) continue;
    totals[0] += 1;
    for (int k = 0; k < 3; ++k) totals[k + 1] += rows[k * tokens + t];
  }
}
}  // namespace influence_detail

inline void block_influence(address x, address y, int dtype, std::int64_t tokens,
                            std::int64_t channels, std::int64_t x_stride, std::int64_t y_stride,
                            address mask, address totals, address rows, int threads) {
  with_dtype(dtype, x, [&](auto* typed) {
    using X = std::remove_pointer_t<decltype(typed)>;
    using R = std::conditional_t<std::is_same_v<X, const double>, double, float>;
    influence_detail::run(typed, as<X>(y), tokens, channels, x_stride, y_stride,
                          as<const bool>(mask), as<double>(totals), as<R>(rows), threads);
  });
}
