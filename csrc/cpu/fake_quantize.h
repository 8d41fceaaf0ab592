// fake_quantize: the values that int8_quantize or int4_quantize would store, group by group; the
// rules and the loop stand in int8_quantize.h.
#pragma once

inline void fake_quantize(address x, int dtype, std::int64_t groups, std::int64_t group, int bits,
                          bool symmetric, address clip, address out, int threads) {
  using namespace quantize_detail;
  with_float(dtype, x, [&](const auto* typed) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    advise_huge_pages(as<void>(out), groups * group * sizeof(X));
    each_group(typed, groups, group, as<const float>(clip), {bits, symmetric}, threads,
               [&](const auto* values, std::int64_t n, int i, const Batch& b) {
                 const float most = bits == 4 ? 15.0f - b.zero[i] : 127.0f;
                 const float least = bits == 4 ? -b.zero[i] : -127.0f;
                 const F step = F::set(b.scale[i]);
                 const F floor = F::set(least), ceiling = F::set(most);
                 X* to = as<X>(out) + n * group;
                 each_vector(values, group, [&](F v, std::int64_t k, int lanes) {
                   const F code = rounded(scaled(v, step, floor, ceiling));
                   if (lanes == F::width) return (code * step).store(to + k);
                   store_part(code * step, to + k, lanes);
                 });
               });
  });
}
