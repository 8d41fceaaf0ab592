// rms_norm: y = (offset + weight) * x / sqrt(mean(x^2) + epsilon) of rows x [T, D]. A row stays in
// the first-level cache between its two passes.
#pragma once

namespace norm_detail {
template <typename X>
inline void row(const X* x, const X* weight, X* y, std::int64_t width, float epsilon,
                float offset) {
  constexpr int kStreams = 2;  // independent sums hide the latency of an addition
  const std::int64_t whole = width - width % F::width;
  const int rest = int(width - whole);
  F squares[kStreams] = {F::zero(), F::zero()};
  std::int64_t c = 0;
  for (; c + kStreams * F::width <= whole; c += kStreams * F::width) {
#pragma GCC unroll 2
    for (int j = 0; j < kStreams; ++j) {
      const F v = F::load(x + c + j * F::width);
      squares[j] = fma(v, v, squares[j]);
    }
  }
  for (; c < width; c += F::width) {
    const F v = c < whole ? F::load(x + c) : load_part(x + c, rest, F::zero());
    squares[0] = fma(v, v, squares[0]);
  }
  const float sum = (squares[0] + squares[1]).sum();
  const F scale = F::set(1.0f / std::sqrt(sum / float(width) + epsilon)), add = F::set(offset);
  for (c = 0; c < whole; c += F::width)
    ((add + F::load(weight + c)) * (F::load(x + c) * scale)).store(y + c);
  if (rest) {
    const F v = load_part(x + whole, rest, F::zero()), w = load_part(weight + whole, rest, v);
    store_part((add + w) * (v * scale), y + whole, rest);
  }
}
}  // namespace norm_detail

// x [rows, width], row_stride apart; y contiguous; x, weight and y of one dtype (not f64).
inline void rms_norm(address x, int dtype, std::int64_t rows, std::int64_t width,
                     std::int64_t row_stride, address weight, float epsilon, float offset,
                     address y, int threads) {
  with_dtype(dtype, x, [&](auto* typed) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (!std::is_same_v<X, double>) {
      // Below some microseconds of work a second thread costs more than it does.
      const int used = rows * width < 65536 ? 1 : threads;
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
      for (std::int64_t r = 0; r < rows; ++r)
        norm_detail::row(typed + r * row_stride, as<const X>(weight), as<X>(y) + r * width, width,
                         epsilon, offset);
    }
  });
}
