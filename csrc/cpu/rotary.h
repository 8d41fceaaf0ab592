// rotary: the rotary position embedding of heads: the two halves of a head's values turn together,
// y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. Queries and keys in one call.
#pragma once

namespace rotary_detail {
template <typename X>
inline void turn(const X* x, const X* cosine, const X* sine, X* y, std::int64_t half) {
  std::int64_t c = 0;
  for (; c + F::width <= half; c += F::width) {
    const F first = F::load(x + c), second = F::load(x + half + c);
    const F one = first * F::load(cosine + c) - second * F::load(sine + c);
    fma(second, F::load(cosine + half + c), first * F::load(sine + half + c)).store(y + half + c);
    one.store(y + c);
  }
  for (; c < half; ++c) {
    const float first = to_float(x[c]), second = to_float(x[half + c]);
    y[c] = from_float<X>(first * to_float(cosine[c]) - second * to_float(sine[c]));
    y[half + c] =
        from_float<X>(second * to_float(cosine[half + c]) + first * to_float(sine[half + c]));
  }
}
}  // namespace rotary_detail

// x [B, H, T, D] with strides of batch, head and place; cosine and sine [T, D] or [B, T, D] (angle
// stride 0 or T D); y [B, H, T, D] contiguous; one dtype (not f64).
inline void rotary(address x, int dtype, std::int64_t batch, std::int64_t heads,
                   std::int64_t tokens, std::int64_t width, std::int64_t x0, std::int64_t x1,
                   std::int64_t x2, address cosine, address sine, std::int64_t angle_stride,
                   address y, int threads) {
  with_dtype(dtype, x, [&](auto* typed) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (!std::is_same_v<X, double>) {
      const int used = batch * heads * tokens * width < 65536 ? 1 : threads;
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
      for (std::int64_t i = 0; i < batch * heads * tokens; ++i) {
        const std::int64_t t = i % tokens, h = i / tokens % heads, b = i / tokens / heads;
        const std::int64_t angle = b * angle_stride + t * width;
        rotary_detail::turn(typed + b * x0 + h * x1 + t * x2, as<const X>(cosine) + angle,
                            as<const X>(sine) + angle, as<X>(y) + i * width, width / 2);
      }
    }
  });
}
