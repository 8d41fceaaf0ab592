// linear_kl_topk: the row kernel against a teacher that is known by its k likeliest ids.
//
// The listed logits are saved and replaced by the lowest float, so that the tail is summed by
// itself: all minus listed would lose the digits of a small tail. In the tail the gradient is a
// constant times e^z, one for the divergence and one for the cross-entropy.
#pragma once

namespace topk_detail {
using namespace head_detail;

struct Scales {
  double divergence, entropy, temperature;
};

// The logits of a row without the listed ones.
template <typename X>
struct Tail : Logits<X> {
  using Logits<X>::Logits;
  F at(std::int64_t i, int n, F rest) const {
    const F raw = n == F::width ? F::load(this->data + i) : load_part(this->data + i, n, rest);
    // The mark of a listed id; rounded to bf16 it is minus infinity.
    return if_less(raw, F::set(-3.3e38f), F::set(kLowest), this->capped(raw));
  }
};

inline double log_of_sum(double a, double b) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  if (a == kNothing) return b;
  if (b == kNothing) return a;
  const double most = std::max(a, b);
  return most + std::log(std::exp(a - most) + std::exp(b - most));
}

// What the tail and the listed ids say about one row.
struct Sums {
  double tail, listed;            // log of the sum of e^(z / T)
  double hard_tail, hard_listed;  // the same at temperature one
  double mass, teacher_tail;      // the teacher's total (one, but for rounding) and its tail
  double listed_loss;             // sum of q (log q - z / T)
};

template <typename X>
inline Sums measure(const Tail<X>& z, std::int64_t size, const float* saved, const float* log_q,
                    std::int64_t count, double temperature, float* tail_max) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  Sums s = {kNothing, kNothing, kNothing, kNothing, 0, 0, 0};
  for (std::int64_t j = 0; j < count; ++j) {
    const double q = std::exp(double(log_q[j])), logit = z.one(saved[j]);
    s.mass += q;
    if (q > 0) s.listed_loss += q * (log_q[j] - logit / temperature);
    s.listed = log_of_sum(s.listed, logit / temperature);
    s.hard_listed = log_of_sum(s.hard_listed, logit);
  }
  *tail_max = 0;
  if (count == size) return s;
  F most = F::set(kLowest);
  sweep(0, size, [&](std::int64_t i, int n) { most = max(most, z.at(i, n, F::set(kLowest))); });
  *tail_max = most.maximum();
  const F shift = F::set(*tail_max), inverse = F::set(float(1 / temperature));
  double totals[2];
  sum_row(size, totals, [&](std::int64_t i, int n, F* sums) {
    const F below = z.at(i, n, F::set(kLowest)) - shift;
    sums[0] = sums[0] + exp(below * inverse), sums[1] = sums[1] + exp(below);
  });
  s.tail = std::log(totals[0]) + *tail_max / temperature;
  s.hard_tail = std::log(totals[1]) + *tail_max;
  s.teacher_tail = std::max(0.0, 1 - s.mass);
  s.mass += s.teacher_tail;
  return s;
}

template <typename X>
inline double one_row(const Tail<X>& z, std::int64_t size, const std::int64_t* ids,
                      const float* log_q, float* saved, std::int64_t count, std::int64_t label,
                      const Scales& scales, bool gradient) {
  const double raw_label = label >= 0 ? to_float(z.data[label]) : 0, label_logit = z.one(raw_label);
  for (std::int64_t j = 0; j < count; ++j) saved[j] = to_float(z.data[ids[j]]);
  for (std::int64_t j = 0; j < count; ++j) z.data[ids[j]] = from_float<X>(kLowest);
  float tail_max;
  const double temperature = scales.temperature;
  const Sums s = measure(z, size, saved, log_q, count, temperature, &tail_max);
  const double all = log_of_sum(s.tail, s.listed), hard = log_of_sum(s.hard_tail, s.hard_listed);
  double loss = 0;
  if (scales.divergence > 0) {
    double row = s.listed_loss + (s.mass - s.teacher_tail) * all;
    if (s.teacher_tail > 0) row += s.teacher_tail * (std::log(s.teacher_tail) - s.tail + all);
    loss += scales.divergence * row;
  }
  if (label >= 0) loss += scales.entropy * (hard - label_logit);
  if (!gradient) return loss;

  const double soft_weight = scales.divergence / temperature;
  const double hard_weight = label >= 0 ? scales.entropy : 0;
  const double soft = soft_weight * (s.mass * std::exp(tail_max / temperature - all) -
                                     s.teacher_tail * std::exp(tail_max / temperature - s.tail));
  const double sharp = hard_weight * std::exp(tail_max - hard);
  const F shift = F::set(tail_max), inverse = F::set(float(1 / temperature));
  if (count < size)
    sweep(0, size, [&](std::int64_t i, int n) {
      const F value = z.at(i, n, F::set(kLowest)), below = value - shift;
      F g = exp(below * inverse) * F::set(float(soft)) + exp(below) * F::set(float(sharp));
      z.store(z.cap > 0 ? g * z.slope(i, n) : g, i, n);
    });
  if (label >= 0) {  // stands where the label is in the tail, is overwritten where it is listed
    const double g = soft * std::exp((label_logit - tail_max) / temperature) +
                     sharp * std::exp(label_logit - tail_max) - hard_weight;
    z.data[label] = from_float<X>(float(g * z.slope(raw_label)));
  }
  for (std::int64_t j = 0; j < count; ++j) {
    const double logit = z.one(saved[j]);
    double g = std::exp(logit / temperature - all) * s.mass - std::exp(double(log_q[j]));
    g *= soft_weight;
    if (label >= 0) g += hard_weight * (std::exp(logit - hard) - (ids[j] == label));
    z.data[ids[j]] = from_float<X>(float(g * z.slope(saved[j])));
  }
  return loss;
}

template <typename X>
inline void run(X* student, std::int64_t rows, std::int64_t size, const std::int64_t* ids,
                const float* log_q, float* saved, std::int64_t count, const std::int64_t* labels,
                const Scales& scales, float softcap, bool gradient, double* losses, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < rows; ++r)
    losses[r] = one_row(Tail<X>(student + r * size, softcap), size, ids + r * count,
                        log_q + r * count, saved + r * count, count,
                        labels && scales.entropy > 0 ? labels[r] : -1, scales, gradient);
}
}  // namespace topk_detail

// Logits are contiguous [rows, size] in float or bf16; ids, log_q and the scratch `saved` are
// [rows, count], labels [rows] or zero, losses [rows].
inline void linear_kl_topk(address student, int dtype, std::int64_t rows, std::int64_t size,
                           address ids, address log_q, address saved, std::int64_t count,
                           address labels, double divergence_scale, double entropy_scale,
                           double temperature, float softcap, bool gradient, address losses,
                           int threads) {
  const topk_detail::Scales scales = {divergence_scale, entropy_scale, temperature};
  const auto go = [&](auto* typed) {
    using X = std::remove_pointer_t<decltype(typed)>;
    topk_detail::run(as<X>(student), rows, size, as<const std::int64_t>(ids),
                     as<const float>(log_q), as<float>(saved), count,
                     as<const std::int64_t>(labels), scales, softcap, gradient, as<double>(losses),
                     threads);
  };
  if (static_cast<DType>(dtype) == DType::bf16)
    go(static_cast<bf16*>(nullptr));
  else
    go(static_cast<float*>(nullptr));
}
