// linear_kl: logits of student and teacher from their heads, the loss of each token, and the
// gradients of the student's states and head.
//
// Two sweeps over the vocabulary. The first makes logits and measures them: sums of a running
// softmax, in float over a block and in double over blocks. The second turns the student's logits
// into their gradient and multiplies that out. The exponentials are computed again rather than
// stored. Where the library's products are faster (bf16 instructions), the caller makes the logits,
// and multiplies the gradient out that is left in their place.
#pragma once

namespace kl_detail {
using namespace head_detail;
enum Divergence { kNone = -1, kForward, kReverse, kJensenShannon, kStudentAlone };

struct Scales {
  double divergence, entropy;  // what a row's divergence and cross-entropy weigh in the loss
  double temperature;
};

// The softmaxes of one token: sums of e^((z - max) / T), and of `hard` e^(z - max).
struct Sums {
  double student_max, teacher_max, student, teacher, hard;
  double cross;  // sum over the first distribution of the difference of both logits below maximum
  double from_student, from_teacher;  // to the mean of both
};
constexpr Sums kEmpty = {kLowest, kLowest, 0, 0, 0, 0, 0, 0};

// Moves the sums to other maxima, no lower than their own.
template <int divergence>
inline void move(Sums& s, double student_max, double teacher_max, double temperature) {
  const double up = student_max - s.student_max, student = up / temperature,
               teacher = (teacher_max - s.teacher_max) / temperature;
  if (student == 0 && teacher == 0) return;
  const double p = std::exp(-student), q = std::exp(-teacher);
  if (divergence == kForward) s.cross = q * (s.cross + s.teacher * (student - teacher));
  if (divergence == kReverse) s.cross = p * (s.cross + s.student * (teacher - student));
  s.student *= p, s.teacher *= q, s.hard *= std::exp(-up);
  s.student_max = student_max, s.teacher_max = teacher_max;
}

template <int divergence>
inline void merge(Sums& into, Sums more, double temperature) {
  const double student = std::max(into.student_max, more.student_max),
               teacher = std::max(into.teacher_max, more.teacher_max);
  move<divergence>(into, student, teacher, temperature);
  move<divergence>(more, student, teacher, temperature);
  into.student += more.student, into.teacher += more.teacher, into.hard += more.hard;
  into.cross += more.cross;
  into.from_student += more.from_student, into.from_teacher += more.from_teacher;
}

// One member of the structs of F::width tokens.
template <typename T>
inline F gather(const T* tokens, double T::* member) {
  float lanes[F::width];
  for (int i = 0; i < F::width; ++i) lanes[i] = float(tokens[i].*member);
  return F::load(lanes);
}

// Adds `count` ids to the sums of every token.
template <int divergence, typename S, typename T>
inline void measure(const S& student, const T& teacher, std::int64_t lanes, std::int64_t count,
                    double temperature, bool hard, Sums* sums) {
  const F inverse = F::set(float(1 / temperature));
  constexpr bool kSoft = divergence != kNone, kTeacher = kSoft && divergence != kStudentAlone;
  for (std::int64_t j = 0; j < lanes; j += F::width) {
    F ms = gather(sums + j, &Sums::student_max), mt = gather(sums + j, &Sums::teacher_max);
    for (std::int64_t i = 0; i < count; ++i) {
      ms = max(ms, student.at(i, j));
      if (kTeacher) mt = max(mt, teacher.at(i, j));
    }
    F p_sum = F::zero(), q_sum = F::zero(), hard_sum = F::zero(), cross = F::zero();
    for (std::int64_t i = 0; i < count; ++i) {
      const F below = student.at(i, j) - ms, s = below * inverse;
      const F p = kSoft ? exp(s) : F::zero();
      p_sum = p_sum + p;
      if (hard) hard_sum = hard_sum + exp(below);
      if (!kTeacher) continue;
      const F t = (teacher.at(i, j) - mt) * inverse, q = exp(t);
      q_sum = q_sum + q;
      if (divergence == kForward) cross = fma(q, t - s, cross);
      if (divergence == kReverse) cross = fma(p, s - t, cross);
    }
    float lane[6][F::width];
    ms.store(lane[0]), mt.store(lane[1]), p_sum.store(lane[2]), q_sum.store(lane[3]);
    hard_sum.store(lane[4]), cross.store(lane[5]);
    for (int i = 0; i < F::width; ++i)
      merge<divergence>(
          sums[j + i],
          {lane[0][i], lane[1][i], lane[2][i], lane[3][i], lane[4][i], lane[5][i], 0, 0},
          temperature);
  }
}

// What the gradient needs of one token; `label` and `entropy` are -1 and 0 without a label.
struct Slope {
  double student_max, teacher_max, student, teacher, hard;  // one over each sum
  double log_ratio, offset, label, entropy;
};

// Logarithm of both probabilities over their mean, log(p/m) and log(q/m).
inline void jensen(F s, F t, F log_ratio, F& p_over_m, F& q_over_m) {
  const F d = t - s + log_ratio;
  const F ln2 = F::set(0.69314718055994531f), nearly = log1p_of_fraction(exp(F::zero() - abs(d)));
  // softplus(d) and softplus(-d) each by itself: their difference would lose digits.
  p_over_m = ln2 - (max(F::zero(), d) + nearly);
  q_over_m = ln2 - (max(F::zero(), F::zero() - d) + nearly);
}

// Adds `count` ids to the means of log(p/m) and log(q/m).
template <typename X>
inline void measure_to_mean(const Logits<X>& student, const Logits<X>& teacher, std::int64_t lanes,
                            std::int64_t count, double temperature, const Slope* slopes,
                            Sums* sums) {
  const F inverse = F::set(float(1 / temperature));
  for (std::int64_t j = 0; j < lanes; j += F::width) {
    const F ms = gather(slopes + j, &Slope::student_max),
            mt = gather(slopes + j, &Slope::teacher_max),
            ratio = gather(slopes + j, &Slope::log_ratio);
    F from_student = F::zero(), from_teacher = F::zero();
    for (std::int64_t i = 0; i < count; ++i) {
      const F s = (student.at(i, j) - ms) * inverse, t = (teacher.at(i, j) - mt) * inverse;
      F p_over_m, q_over_m;
      jensen(s, t, ratio, p_over_m, q_over_m);
      from_student = fma(exp(s), p_over_m, from_student);
      from_teacher = fma(exp(t), q_over_m, from_teacher);
    }
    float lane[2][F::width];
    from_student.store(lane[0]), from_teacher.store(lane[1]);
    for (int i = 0; i < F::width; ++i)
      sums[j + i].from_student += lane[0][i], sums[j + i].from_teacher += lane[1][i];
  }
}

// One in the lanes whose label is this id.
inline F at_label(F label, std::int64_t id) {
  return if_less(abs(label - F::set(float(id))), F::set(0.5f), F::set(1), F::zero());
}

// Puts the gradient of the loss in the place of `count` logits, the first of them of id `begin`.
template <int divergence, typename X>
inline void differentiate(const Logits<X>& student, const Logits<X>& teacher, std::int64_t lanes,
                          std::int64_t begin, std::int64_t count, const Scales& scales, bool hard,
                          const Slope* slopes) {
  const F inverse = F::set(float(1 / scales.temperature)),
          weight = F::set(float(scales.divergence / scales.temperature));
  for (std::int64_t j = 0; j < lanes; j += F::width) {
    const auto get = [&](double Slope::* member) { return gather(slopes + j, member); };
    const F ms = get(&Slope::student_max), mt = get(&Slope::teacher_max),
            over_s = get(&Slope::student), over_t = get(&Slope::teacher),
            over_hard = get(&Slope::hard), ratio = get(&Slope::log_ratio),
            offset = get(&Slope::offset), label = get(&Slope::label),
            entropy = get(&Slope::entropy);
    for (std::int64_t i = 0; i < count; ++i) {
      const F below = student.at(i, j) - ms, s = below * inverse;
      F gradient = F::zero();
      if (divergence != kNone) {
        const F p = exp(s) * over_s, t = (teacher.at(i, j) - mt) * inverse;
        if (divergence == kForward) {
          gradient = weight * (p - exp(t) * over_t);
        } else if (divergence == kReverse) {
          gradient = weight * p * (s - t - offset);
        } else {
          F p_over_m, q_over_m;
          jensen(s, t, ratio, p_over_m, q_over_m);
          gradient = weight * F::set(0.5f) * p * (p_over_m - offset);
        }
      }
      if (hard)
        gradient = fma(entropy, exp(below) * over_hard - at_label(label, begin + i), gradient);
      student.store(student.cap > 0 ? gradient * student.slope(i, j) : gradient, i, j);
    }
  }
}

// Fills what the gradient needs and returns the loss; a label below zero means none.
template <int divergence, typename X>
inline double finish(const Sums& s, const Scales& scales, std::int64_t label,
                     const Logits<X>& student, std::int64_t token, Slope& slope) {
  const double log_ratio = divergence == kNone ? 0 : std::log(s.student) - std::log(s.teacher);
  slope = {s.student_max,
           s.teacher_max,
           1 / s.student,
           1 / s.teacher,
           1 / s.hard,
           log_ratio,
           0,
           double(label),
           label >= 0 ? scales.entropy : 0};
  double row = 0, loss = 0;
  if (divergence == kForward) row = s.cross / s.teacher + log_ratio;
  if (divergence == kReverse) {
    row = s.cross / s.student - log_ratio;
    slope.offset = log_ratio + row;
  }
  if (divergence == kJensenShannon) {
    slope.offset = s.from_student / s.student;
    row = 0.5 * (slope.offset + s.from_teacher / s.teacher);
  }
  if (divergence != kNone) loss = scales.divergence * row;
  if (label >= 0) {
    const double z = student.one(to_float(student.data[label * student.stride + token]));
    loss += scales.entropy * (std::log(s.hard) + s.student_max - z);
  }
  return loss;
}

template <int divergence, typename X>
inline void run(const Chunk& chunk, const Logits<X>& student, const Logits<X>& teacher,
                const std::int64_t* labels, const Scales& scales, bool gradient, Sums* sums,
                Slope* slopes, double* losses) {
  const std::int64_t lanes = chunk.lanes();
  const bool hard = labels && scales.entropy > 0;
  const auto block = [&](const Logits<X>& all, std::int64_t begin) {
    Logits<X> part = all;
    part.data += begin * chunk.stride;
    return part;
  };
  const auto gather_parts = [&] {
    for (std::int64_t t = 0; t < lanes; ++t) {
      Sums& all = sums[t];
      for (int part = 1; part < chunk.threads; ++part)
        merge<divergence>(all, sums[part * lanes + t], scales.temperature);
      const std::int64_t label = hard && t < chunk.tokens ? labels[t] : -1;
      const double loss = finish<divergence>(all, scales, label, student, t, slopes[t]);
      if (t < chunk.tokens) losses[t] = loss;
    }
  };
  std::fill(sums, sums + chunk.threads * lanes, kEmpty);
  each_block(chunk, [&](int part, std::int64_t begin, std::int64_t count) {
    const Logits<X> s = block(student, begin), t = block(teacher, begin);
    if constexpr (std::is_same_v<X, float>)
      if (chunk.student.weight) {
        project(chunk, chunk.student, begin, count, chunk.scratch_of(part), s.data);
        if (divergence != kNone)
          project(chunk, chunk.teacher, begin, count, chunk.scratch_of(part), t.data);
      }
    measure<divergence>(s, t, lanes, count, scales.temperature, hard, sums + part * lanes);
  });
  gather_parts();
  if (divergence == kJensenShannon) {
    // The same sums again would be counted twice: only the means are new.
    for (int part = 1; part < chunk.threads; ++part)
      std::fill(sums + part * lanes, sums + (part + 1) * lanes, kEmpty);
    each_block(chunk, [&](int part, std::int64_t begin, std::int64_t count) {
      measure_to_mean(block(student, begin), block(teacher, begin), lanes, count,
                      scales.temperature, slopes, sums + part * lanes);
    });
    gather_parts();
  }
  if (!gradient) return;
  each_block(chunk, [&](int part, std::int64_t begin, std::int64_t count) {
    const Logits<X> s = block(student, begin);
    differentiate<divergence>(s, block(teacher, begin), lanes, begin, count, scales, hard, slopes);
    if constexpr (std::is_same_v<X, float>) {
      if (chunk.d_weight) add_to_weight(chunk, begin, count, s.data);
      if (chunk.d_hidden)
        add_to_hidden(chunk, part, begin, count, s.data, block(teacher, begin).data);
    }
  });
}
}  // namespace kl_detail

// Logits are [size, stride] in float or bf16, the last lanes of a vector finite; labels [tokens] or
// zero, losses [tokens], sums the workspace of Sums [threads, stride] and Slope [stride].
inline void linear_kl(address student, address teacher, int dtype, std::int64_t tokens,
                      std::int64_t stride, std::int64_t size, address labels, int divergence,
                      double divergence_scale, double entropy_scale, double temperature,
                      float softcap, float teacher_softcap, bool gradient, address sums,
                      address losses, int threads, address student_states, address student_weight,
                      int student_dtype, std::int64_t student_width, address teacher_states,
                      address teacher_weight, int teacher_dtype, std::int64_t teacher_width,
                      address workspace, address d_weight, address d_hidden, bool first) {
  using namespace kl_detail;
  Chunk chunk = {tokens,
                 stride,
                 size,
                 threads,
                 {student_weight, student_dtype, student_width, nullptr},
                 {teacher_weight, teacher_dtype, teacher_width, nullptr},
                 nullptr,
                 as<float>(d_weight),
                 as<float>(d_hidden),
                 nullptr,
                 first};
  if (student_weight)
    pack(chunk, as<const float>(student_states), as<const float>(teacher_states),
         as<float>(workspace));
  const Scales scales = {divergence_scale, entropy_scale, temperature};
  const auto go = [&](auto* typed, auto chosen) {
    using X = std::remove_pointer_t<decltype(typed)>;
    run<decltype(chosen)::value>(chunk, Logits<X>(as<X>(student), stride, softcap),
                                 Logits<X>(as<X>(teacher), stride, teacher_softcap),
                                 as<const std::int64_t>(labels), scales, gradient, as<Sums>(sums),
                                 reinterpret_cast<Slope*>(as<Sums>(sums) + threads * stride),
                                 as<double>(losses));
  };
  const auto choose = [&](auto* typed) {
    if (divergence == kForward) return go(typed, std::integral_constant<int, kForward>());
    if (divergence == kReverse) return go(typed, std::integral_constant<int, kReverse>());
    if (divergence == kJensenShannon)
      return go(typed, std::integral_constant<int, kJensenShannon>());
    go(typed, std::integral_constant<int, kNone>());
  };
  if (static_cast<DType>(dtype) == DType::bf16)
    choose(static_cast<bf16*>(nullptr));
  else
    choose(static_cast<float*>(nullptr));
}
