// gated_activation: y = activation(gate) * up, row by row: SwiGLU with SiLU, GeGLU with GELU.
#pragma once

namespace gate_detail {
enum class Activation : int { silu = 0, gelu_tanh = 1 };

// x / (1 + e^-x); our exp ends at 2e38, so that the quotient of a very negative x is as good as 0.
template <Activation A>
inline F apply(F x) {
  const F one = F::set(1.0f);
  F inner = x;
  if constexpr (A == Activation::gelu_tanh) {
    // 0.5 x (1 + tanh u) = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
    const F cubic = fma(x * x, F::set(0.044715f), one);
    inner = F::set(1.5957691216057308f) * x * cubic;
  }
  return x / (one + exp(F::zero() - inner));
}

template <Activation A, typename X>
inline void row(const X* gate, const X* up, X* y, std::int64_t width) {
  std::int64_t c = 0;
  for (; c + F::width <= width; c += F::width)
    (apply<A>(F::load(gate + c)) * F::load(up + c)).store(y + c);
  if (const int rest = int(width - c)) {
    const F g = load_part(gate + c, rest, F::zero()), u = load_part(up + c, rest, F::zero());
    store_part(apply<A>(g) * u, y + c, rest);
  }
}
}  // namespace gate_detail

// gate and up [rows, width] with strides from row to row; y contiguous; one dtype (not f64).
inline void gated_activation(address gate, address up, int dtype, std::int64_t rows,
                             std::int64_t width, std::int64_t gate_stride, std::int64_t up_stride,
                             int activation, address y, int threads) {
  using gate_detail::Activation;
  with_dtype(dtype, gate, [&](auto* typed) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (!std::is_same_v<X, double>) {
      const auto run = [&](std::int64_t r) {
        const X *g = typed + r * gate_stride, *u = as<const X>(up) + r * up_stride;
        X* out = as<X>(y) + r * width;
        if (static_cast<Activation>(activation) == Activation::silu)
          gate_detail::row<Activation::silu>(g, u, out, width);
        else
          gate_detail::row<Activation::gelu_tanh>(g, u, out, width);
      };
      const int used = rows * width < 32768 ? 1 : threads;
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
      for (std::int64_t r = 0; r < rows; ++r) run(r);
    }
  });
}
