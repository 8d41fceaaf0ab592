// linear_kl_topk: the same against a teacher that is known by its k likeliest ids.
//
// The listed logits are saved and replaced by the lowest float, so that the tail is summed by
// itself: all minus listed would lose the digits of a small tail. In the tail the gradient is a
// constant times e^z, one for the divergence and one for the cross-entropy. The caller sorts the
// listed ids, so that a block of the vocabulary finds its own.
#pragma once

namespace topk_detail {
using namespace kl_detail;

// The logits of a block without the listed ones.
template <typename X>
struct Tail : Logits<X> {
  using Logits<X>::Logits;
  F at(std::int64_t id, std::int64_t token) const {
    const F z = this->raw(id, token);
    // The mark of a listed id; rounded to bf16 it is minus infinity.
    return if_less(z, F::set(-3.3e38f), F::set(kLowest), this->capped(z));
  }
};

// The ids that the teacher lists: [tokens, count], and all of them sorted by id with their place.
struct Listed {
  std::int64_t tokens, count;
  const std::int64_t *ids, *sorted, *places;
  const float* log_q;
  float* saved;  // first the logits, then the gradients

  // Calls body(place, id, token) for the listed ids of a block.
  template <typename Body>
  void each(std::int64_t begin, std::int64_t ids_of_block, Body&& body) const {
    const std::int64_t* end = sorted + tokens * count;
    for (const std::int64_t* id = std::lower_bound(sorted, end, begin);
         id < end && *id < begin + ids_of_block; ++id)
      body(places[id - sorted], *id - begin, places[id - sorted] / count);
  }
};

inline double log_of_sum(double a, double b) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  if (a == kNothing) return b;
  if (b == kNothing) return a;
  const double most = std::max(a, b);
  return most + std::log(std::exp(a - most) + std::exp(b - most));
}

// The gradient in the tail: soft e^((z - max) / T) + sharp e^(z - max), less `hard` at the label.
struct TailSlope {
  double max, soft, sharp, label, hard;
};

// Returns the loss of one token; puts the gradients of its listed logits in their place.
template <typename X>
inline double finish(const Tail<X>& z, std::int64_t size, const Listed& listed, std::int64_t token,
                     const Sums& sums, std::int64_t label, const Scales& scales, TailSlope& slope) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const double temperature = scales.temperature;
  const std::int64_t first = token * listed.count;
  double mass = 0, own = kNothing, hard_own = kNothing, row = 0, label_logit = 0;
  if (label >= 0) label_logit = z.one(to_float(z.data[label * z.stride + token]));
  for (std::int64_t j = first; j < first + listed.count; ++j) {
    const double q = std::exp(double(listed.log_q[j])), logit = z.one(listed.saved[j]);
    mass += q;
    if (q > 0) row += q * (listed.log_q[j] - logit / temperature);
    own = log_of_sum(own, logit / temperature), hard_own = log_of_sum(hard_own, logit);
    if (listed.ids[j] == label) label_logit = logit;
  }
  double tail = kNothing, hard_tail = kNothing, teacher_tail = 0;
  if (listed.count < size) {
    tail = std::log(sums.student) + sums.student_max / temperature;
    hard_tail = std::log(temperature == 1 ? sums.student : sums.hard) + sums.student_max;
    teacher_tail = std::max(0.0, 1 - mass);
    mass += teacher_tail;
  }
  const double all = log_of_sum(tail, own), hard = log_of_sum(hard_tail, hard_own);
  row += (mass - teacher_tail) * all;
  if (teacher_tail > 0) row += teacher_tail * (std::log(teacher_tail) - tail + all);
  double loss = scales.divergence > 0 ? scales.divergence * row : 0;
  if (label >= 0) loss += scales.entropy * (hard - label_logit);

  const double soft_weight = scales.divergence / temperature;
  const double hard_weight = label >= 0 ? scales.entropy : 0,
               soft_max = sums.student_max / temperature;
  slope = {
      sums.student_max,
      soft_weight * (mass * std::exp(soft_max - all) - teacher_tail * std::exp(soft_max - tail)),
      hard_weight * std::exp(sums.student_max - hard), double(label), hard_weight};
  for (std::int64_t j = first; j < first + listed.count; ++j) {
    const double logit = z.one(listed.saved[j]);
    double g = soft_weight *
               (std::exp(logit / temperature - all) * mass - std::exp(double(listed.log_q[j])));
    if (label >= 0) g += hard_weight * (std::exp(logit - hard) - (listed.ids[j] == label));
    listed.saved[j] = float(g * z.slope(listed.saved[j]));
  }
  return loss;
}

// Puts the gradient in the place of `count` logits of the tail, the first of them of id `begin`.
template <typename X>
inline void differentiate(const Tail<X>& z, std::int64_t lanes, std::int64_t begin,
                          std::int64_t count, double temperature, bool hard,
                          const TailSlope* slopes) {
  const F inverse = F::set(float(1 / temperature));
  for (std::int64_t j = 0; j < lanes; j += F::width) {
    const F shift = gather(slopes + j, &TailSlope::max),
            soft = gather(slopes + j, &TailSlope::soft),
            sharp = gather(slopes + j, &TailSlope::sharp),
            label = gather(slopes + j, &TailSlope::label),
            entropy = gather(slopes + j, &TailSlope::hard);
    for (std::int64_t i = 0; i < count; ++i) {
      const F below = z.at(i, j) - shift;
      F g = exp(below * inverse) * soft;
      if (hard) g = g + (exp(below) * sharp - at_label(label, begin + i) * entropy);
      z.store(z.cap > 0 ? g * z.slope(i, j) : g, i, j);
    }
  }
}

template <typename X>
inline void run(const Chunk& chunk, const Tail<X>& all, const Listed& listed,
                const std::int64_t* labels, const Scales& scales, bool gradient, Sums* sums,
                TailSlope* slopes, double* losses) {
  const std::int64_t lanes = chunk.lanes();
  const bool hard = labels && scales.entropy > 0;
  const auto block = [&](std::int64_t begin) {
    Tail<X> part = all;
    part.data += begin * chunk.stride;
    return part;
  };
  std::fill(sums, sums + chunk.threads * lanes, kEmpty);
  each_block(chunk, [&](int part, std::int64_t begin, std::int64_t count) {
    const Tail<X> z = block(begin);
    if constexpr (std::is_same_v<X, float>)
      if (chunk.student.weight)
        project(chunk, chunk.student, begin, count, chunk.scratch_of(part), z.data);
    listed.each(begin, count, [&](std::int64_t place, std::int64_t id, std::int64_t token) {
      X& logit = z.data[id * z.stride + token];
      listed.saved[place] = to_float(logit);
      logit = from_float<X>(kLowest);
    });
    measure<kStudentAlone>(z, z, lanes, count, scales.temperature, hard && scales.temperature != 1,
                           sums + part * lanes);
  });
#pragma omp parallel for num_threads(chunk.threads) schedule(static)
  for (std::int64_t t = 0; t < lanes; ++t) {
    slopes[t] = {};
    if (t >= chunk.tokens) continue;
    for (int part = 1; part < chunk.threads; ++part)
      merge<kStudentAlone>(sums[t], sums[part * lanes + t], scales.temperature);
    losses[t] =
        finish(all, chunk.vocabulary, listed, t, sums[t], hard ? labels[t] : -1, scales, slopes[t]);
  }
  if (!gradient) return;
  each_block(chunk, [&](int part, std::int64_t begin, std::int64_t count) {
    const Tail<X> z = block(begin);
    differentiate(z, lanes, begin, count, scales.temperature, hard, slopes);
    listed.each(begin, count, [&](std::int64_t place, std::int64_t id, std::int64_t token) {
      z.data[id * z.stride + token] = from_float<X>(listed.saved[place]);
    });
    if constexpr (std::is_same_v<X, float>) {
      if (chunk.d_weight) add_to_weight(chunk, begin, count, z.data);
      if (chunk.d_hidden) add_to_hidden(chunk, part, begin, count, z.data, nullptr);
    }
  });
}
}  // namespace topk_detail

// As linear_kl; ids, their order (sorted, places), log_q and the scratch `saved` are
// [tokens, count].
inline void linear_kl_topk(address student, int dtype, std::int64_t tokens, std::int64_t stride,
                           std::int64_t size, address ids, address sorted, address places,
                           address log_q, address saved, std::int64_t count, address labels,
                           double divergence_scale, double entropy_scale, double temperature,
                           float softcap, bool gradient, address sums, address losses, int threads,
                           address student_states, address student_weight, int student_dtype,
                           std::int64_t student_width, address workspace, address d_weight,
                           address d_hidden, bool first) {
  using namespace topk_detail;
  Chunk chunk = {tokens,
                 stride,
                 size,
                 threads,
                 {student_weight, student_dtype, student_width, nullptr},
                 {0, 0, 0, nullptr},
                 nullptr,
                 as<float>(d_weight),
                 as<float>(d_hidden),
                 nullptr,
                 first};
  if (student_weight) pack(chunk, as<const float>(student_states), nullptr, as<float>(workspace));
  const Listed listed = {tokens,
                         count,
                         as<const std::int64_t>(ids),
                         as<const std::int64_t>(sorted),
                         as<const std::int64_t>(places),
                         as<const float>(log_q),
                         as<float>(saved)};
  const auto go = [&](auto* typed) {
    using X = std::remove_pointer_t<decltype(typed)>;
    run(chunk, Tail<X>(as<X>(student), stride, softcap), listed, as<const std::int64_t>(labels),
        {divergence_scale, entropy_scale, temperature}, gradient, as<Sums>(sums),
        reinterpret_cast<TailSlope*>(as<Sums>(sums) + threads * stride), as<double>(losses));
  };
  if (static_cast<DType>(dtype) == DType::bf16)
    go(static_cast<bf16*>(nullptr));
  else
    go(static_cast<float*>(nullptr));
}
