// linear_kl: the row kernel between the matrix products. Logits of student and teacher come in, the
// loss of each row goes out, and the gradient for the student's logits replaces them.
//
// A row is read three times (maximum; sums; gradient), from the second-level cache after the first:
// 2 x 196 KB at a vocabulary of 49,152. The exponentials are computed again rather than stored.
// Vector sums run over 64 vectors and then go to double.
#pragma once

namespace head_detail {
constexpr int kRun = 64;  // vectors summed in float
constexpr float kLowest = -FLT_MAX;

// The logits of one row, capped as they are read.
template <typename X>
struct Logits {
  X* data;
  float cap, inverse_cap;

  Logits(X* row, float softcap) : data(row), cap(softcap), inverse_cap(1 / softcap) {}
  F capped(F z) const { return cap > 0 ? F::set(cap) * tanh(z * F::set(inverse_cap)) : z; }
  // Lanes behind the end of the row hold `rest`.
  F at(std::int64_t i, int n, F rest) const {
    if (n == F::width) return capped(F::load(data + i));
    float lanes[F::width];
    capped(load_part(data + i, n, F::zero())).store(lanes);
    return load_part(lanes, n, rest);
  }
  double one(double raw) const { return cap > 0 ? cap * std::tanh(raw / cap) : raw; }
  // The slope of the cap, 1 - tanh^2, in a form that keeps its digits where tanh is nearly one.
  F slope(std::int64_t i, int n) const {
    const F raw = n == F::width ? F::load(data + i) : load_part(data + i, n, F::zero());
    const F u = exp(F::set(-2 * inverse_cap) * abs(raw)), below = u + F::set(1);
    return F::set(4) * u / (below * below);
  }
  double slope(double raw) const {
    if (!(cap > 0)) return 1;
    const double u = std::exp(-2 * std::abs(raw) / cap);
    return 4 * u / ((1 + u) * (1 + u));
  }
  void store(F x, std::int64_t i, int n) const {
    if (n == F::width)
      x.store(data + i);
    else
      store_part(x, data + i, n);
  }
};

// Calls body(i, n) for each vector of a row; n lanes of the last one are alive.
template <typename Body>
inline void sweep(std::int64_t begin, std::int64_t end, Body&& body) {
  std::int64_t i = begin;
  for (; i + F::width <= end; i += F::width) body(i, F::width);
  if (i < end) body(i, int(end - i));
}

// Sums of `count` terms over a row, in double over runs of vectors: body(i, n, sums).
template <int count, typename Body>
inline void sum_row(std::int64_t size, double (&totals)[count], Body&& body) {
  for (int k = 0; k < count; ++k) totals[k] = 0;
  for (std::int64_t begin = 0; begin < size; begin += kRun * F::width) {
    F sums[count];
    for (int k = 0; k < count; ++k) sums[k] = F::zero();
    sweep(begin, std::min(begin + kRun * F::width, size),
          [&](std::int64_t i, int n) { body(i, n, sums); });
    for (int k = 0; k < count; ++k) totals[k] += sums[k].sum();
  }
}

template <typename X>
inline float maximum(const Logits<X>& z, std::int64_t size) {
  F most = F::set(kLowest);
  sweep(0, size, [&](std::int64_t i, int n) { most = max(most, z.at(i, n, F::set(kLowest))); });
  return most.maximum();
}

// One in the living lanes of a vector, zero behind them.
inline F alive(int n) {
  float lanes[F::width] = {};
  for (int i = 0; i < n; ++i) lanes[i] = 1;
  return F::load(lanes);
}

// One in the lane of the label where this vector holds it.
inline F at_label(std::int64_t label, std::int64_t i) {
  float lanes[F::width] = {};
  if (label >= i && label < i + F::width) lanes[label - i] = 1;
  return F::load(lanes);
}
}  // namespace head_detail

namespace kl_detail {
using namespace head_detail;
enum Divergence { kNone = -1, kForward, kReverse, kJensenShannon };

struct Scales {
  double divergence, entropy;  // what a row's divergence and cross-entropy weigh in the loss
  double temperature;
};

// The two softmaxes of one row; e^(z - max) / sum with the sums of `measure`.
template <typename X>
struct Row {
  Logits<X> student, teacher;
  std::int64_t size;
  float inverse_temperature, student_max, teacher_max;
  double student_sum = 0, teacher_sum = 0, hard_sum = 0;  // hard: at temperature one
  double divergence = 0, from_student = 0;

  struct Pair {
    F s, t;
  };
  // Softened logits below their maximum: a = (z_s - max_s) / T, b = (z_t - max_t) / T.
  Pair soft(std::int64_t i, int n) const {
    const F inverse = F::set(inverse_temperature), ms = F::set(student_max),
            mt = F::set(teacher_max);
    return {(student.at(i, n, ms) - ms) * inverse, (teacher.at(i, n, mt) - mt) * inverse};
  }
  // Logarithm of both probabilities over their mean, log(p/m) and log(q/m).
  void jensen(Pair z, F& p_over_m, F& q_over_m) const {
    const F d = z.t - z.s + F::set(float(std::log(student_sum) - std::log(teacher_sum)));
    const F ln2 = F::set(0.69314718055994531f), nearly = log1p_of_fraction(exp(F::zero() - abs(d)));
    // softplus(d) and softplus(-d) each by itself: their difference would lose digits.
    p_over_m = ln2 - (max(F::zero(), d) + nearly);
    q_over_m = ln2 - (max(F::zero(), F::zero() - d) + nearly);
  }
};

// Fills the sums of the softmaxes and the divergence between them.
template <int divergence, typename X>
inline void measure(Row<X>& row) {
  double totals[3];
  sum_row(row.size, totals, [&](std::int64_t i, int n, F* sums) {
    const auto z = row.soft(i, n);
    F s = exp(z.s), t = exp(z.t);
    if (n < F::width) s = s * alive(n), t = t * alive(n);
    sums[0] = sums[0] + s, sums[1] = sums[1] + t;
    if (divergence == kForward) sums[2] = fma(t, z.t - z.s, sums[2]);
    if (divergence == kReverse) sums[2] = fma(s, z.s - z.t, sums[2]);
  });
  row.student_sum = totals[0], row.teacher_sum = totals[1];
  const double ratio = std::log(totals[0]) - std::log(totals[1]);
  if (divergence == kForward) row.divergence = totals[2] / totals[1] + ratio;
  if (divergence == kReverse) row.divergence = totals[2] / totals[0] - ratio;
  if (divergence != kJensenShannon) return;
  double means[2];
  sum_row(row.size, means, [&](std::int64_t i, int n, F* sums) {
    F p_over_m, q_over_m;
    const auto z = row.soft(i, n);
    row.jensen(z, p_over_m, q_over_m);
    F s = exp(z.s), t = exp(z.t);
    if (n < F::width) s = s * alive(n), t = t * alive(n);
    sums[0] = fma(s, p_over_m, sums[0]), sums[1] = fma(t, q_over_m, sums[1]);
  });
  row.from_student = means[0] / totals[0];
  row.divergence = 0.5 * (row.from_student + means[1] / totals[1]);
}

// The gradient of the loss for one vector of logits.
template <int divergence, typename X>
inline F slope(const Row<X>& row, const Scales& scales, std::int64_t label, std::int64_t i, int n) {
  F gradient = F::zero();
  if (divergence != kNone) {
    const F weight = F::set(float(scales.divergence / scales.temperature));
    const auto z = row.soft(i, n);
    const F p = exp(z.s) * F::set(float(1 / row.student_sum));
    if (divergence == kForward) {
      gradient = weight * (p - exp(z.t) * F::set(float(1 / row.teacher_sum)));
    } else if (divergence == kReverse) {
      const double ratio = std::log(row.student_sum) - std::log(row.teacher_sum);
      gradient = weight * p * (z.s - z.t - F::set(float(ratio + row.divergence)));
    } else {
      F p_over_m, q_over_m;
      row.jensen(z, p_over_m, q_over_m);
      gradient = weight * F::set(0.5f) * p * (p_over_m - F::set(float(row.from_student)));
    }
  }
  const F z = row.student.at(i, n, F::set(row.student_max));
  if (label >= 0) {
    const F p = exp(z - F::set(row.student_max)) * F::set(float(1 / row.hard_sum));
    const F target = label >= i && label < i + F::width ? at_label(label, i) : F::zero();
    gradient = fma(F::set(float(scales.entropy)), p - target, gradient);
  }
  return row.student.cap > 0 ? gradient * row.student.slope(i, n) : gradient;
}

// Returns the loss of one row; a label below zero means none.
template <int divergence, typename X>
inline double one_row(Row<X> row, const Scales& scales, std::int64_t label, bool gradient) {
  double loss = 0;
  row.student_max = maximum(row.student, row.size);
  if (divergence != kNone) {
    row.teacher_max = maximum(row.teacher, row.size);
    measure<divergence>(row);
    loss = scales.divergence * row.divergence;
  }
  if (label >= 0) {
    double total[1];
    const F most = F::set(row.student_max);
    if (divergence != kNone && scales.temperature == 1)
      total[0] = row.student_sum;
    else
      sum_row(row.size, total, [&](std::int64_t i, int n, F* sums) {
        const F s = exp(row.student.at(i, n, most) - most);
        sums[0] = sums[0] + (n < F::width ? s * alive(n) : s);
      });
    row.hard_sum = total[0];
    loss += scales.entropy * (std::log(total[0]) + row.student_max -
                              row.student.one(to_float(row.student.data[label])));
  }
  if (gradient)
    sweep(0, row.size, [&](std::int64_t i, int n) {
      row.student.store(slope<divergence>(row, scales, label, i, n), i, n);
    });
  return loss;
}

template <int divergence, typename X>
inline void run(X* student, X* teacher, std::int64_t rows, std::int64_t size,
                const std::int64_t* labels, const Scales& scales, float softcap,
                float teacher_softcap, bool gradient, double* losses, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < rows; ++r) {
    Row<X> row = {{student + r * size, softcap}, {teacher + r * size, teacher_softcap}, size};
    row.inverse_temperature = float(1 / scales.temperature);
    const std::int64_t label = labels && scales.entropy > 0 ? labels[r] : -1;
    losses[r] = one_row<divergence>(row, scales, label, gradient);
  }
}

template <typename X>
inline void choose(int divergence, X* student, X* teacher, std::int64_t rows, std::int64_t size,
                   const std::int64_t* labels, const Scales& scales, float softcap,
                   float teacher_softcap, bool gradient, double* losses, int threads) {
  const auto go = [&](auto chosen) {
    run<decltype(chosen)::value>(student, teacher, rows, size, labels, scales, softcap,
                                 teacher_softcap, gradient, losses, threads);
  };
  if (divergence == kForward) return go(std::integral_constant<int, kForward>());
  if (divergence == kReverse) return go(std::integral_constant<int, kReverse>());
  if (divergence == kJensenShannon) return go(std::integral_constant<int, kJensenShannon>());
  go(std::integral_constant<int, kNone>());
}
}  // namespace kl_detail

// Logits are contiguous [rows, size] in float or bf16; labels [rows] or zero, losses [rows].
inline void linear_kl(address student, address teacher, int dtype, std::int64_t rows,
                      std::int64_t size, address labels, int divergence, double divergence_scale,
                      double entropy_scale, double temperature, float softcap,
                      float teacher_softcap, bool gradient, address losses, int threads) {
  const kl_detail::Scales scales = {divergence_scale, entropy_scale, temperature};
  const auto go = [&](auto* typed) {
    using X = std::remove_pointer_t<decltype(typed)>;
    kl_detail::choose(divergence, as<X>(student), as<X>(teacher), rows, size,
                      as<const std::int64_t>(labels), scales, softcap, teacher_softcap, gradient,
                      as<double>(losses), threads);
  };
  if (static_cast<DType>(dtype) == DType::bf16)
    go(static_cast<bf16*>(nullptr));
  else
    go(static_cast<float*>(nullptr));
}
