// What the losses behind a linear head share: logits of a chunk of tokens, and the products around
// them.
//
// Logits lie as [vocabulary, tokens]. So a head [V, D] is the left operand of every product as it
// stands, without packing, and a vector of the row kernel holds one id of many tokens, whose sums
// need no reduction. The vocabulary is taken kBlock ids at a time: a block of logits is measured
// while the cache holds it, and its gradient goes into both products before it leaves.
#pragma once

namespace head_detail {
constexpr int kBlock = 96;  // ids: the block of the head, 221 KB at D = 576, fits the second level
constexpr std::int64_t kDepth =
    1024;  // of a product at a time; longer panels leave the second level
constexpr float kLowest = -FLT_MAX;

// The logits of a block of ids, capped as they are read.
template <typename X>
struct Logits {
  X* data;
  std::int64_t stride;
  float cap, inverse_cap;

  Logits(X* first, std::int64_t row, float softcap)
      : data(first), stride(row), cap(softcap), inverse_cap(1 / softcap) {}
  F capped(F z) const { return cap > 0 ? F::set(cap) * tanh(z * F::set(inverse_cap)) : z; }
  F raw(std::int64_t id, std::int64_t token) const { return F::load(data + id * stride + token); }
  F at(std::int64_t id, std::int64_t token) const { return capped(raw(id, token)); }
  double one(double z) const { return cap > 0 ? cap * std::tanh(z / cap) : z; }
  // The slope of the cap, 1 - tanh^2, in a form that keeps its digits where tanh is nearly one.
  F slope(std::int64_t id, std::int64_t token) const {
    const F u = exp(F::set(-2 * inverse_cap) * abs(raw(id, token))), below = u + F::set(1);
    return F::set(4) * u / (below * below);
  }
  double slope(double z) const {
    if (!(cap > 0)) return 1;
    const double u = std::exp(-2 * std::abs(z) / cap);
    return 4 * u / ((1 + u) * (1 + u));
  }
  void store(F x, std::int64_t id, std::int64_t token) const {
    x.store(data + id * stride + token);
  }
};

// A head [V, width] and the states before it, packed as panels [width, kPanel] of tokens.
struct Head {
  address weight;
  int dtype;
  std::int64_t width;
  const float* states;

  // Rows of the weight in float; `scratch` takes them where they are not.
  const float* rows(std::int64_t begin, std::int64_t count, float* scratch) const {
    if (static_cast<DType>(dtype) == DType::f32) return as<const float>(weight) + begin * width;
    with_dtype(dtype, weight, [&](auto* typed) {
      std::int64_t i = 0;
      if constexpr (!std::is_same_v<decltype(typed), const double*>)
        for (; i + F::width <= count * width; i += F::width)
          F::load(typed + begin * width + i).store(scratch + i);
      for (; i < count * width; ++i) scratch[i] = float(to_float(typed[begin * width + i]));
    });
    return scratch;
  }
};

// The tokens of one call and the products that the kernel makes itself.
struct Chunk {
  std::int64_t tokens, stride, vocabulary;
  int threads;
  Head student, teacher;  // without a weight the logits are there already
  const float* states;    // the student's, packed as panels [tokens, kPanel] of channels
  float *d_weight, *d_hidden, *scratch;  // d_hidden: [threads, width, stride], summed by the caller
  bool first;                            // d_weight is written, not added to

  std::int64_t lanes() const { return (tokens + F::width - 1) / F::width * F::width; }
  float* scratch_of(int part) const {
    return scratch + part * kBlock * std::max(student.width, teacher.width);
  }
};

// Packs [tokens, width] states as panels [width, kPanel] of tokens; returns the place behind them.
inline float* pack_tokens(const float* states, std::int64_t tokens, std::int64_t width, float* to) {
  for (std::int64_t t = 0; t < tokens; t += product::kPanel, to += width * product::kPanel)
    product::pack_transposed(states + t * width, width,
                             int(std::min<std::int64_t>(product::kPanel, tokens - t)), width, to);
  return to;
}

// Readies a chunk whose products the kernel makes; the workspace holds the student's states twice,
// the teacher's once, then the scratch.
inline void pack(Chunk& chunk, const float* student, const float* teacher, float* workspace) {
  const std::int64_t tokens = chunk.tokens, width = chunk.student.width;
  chunk.student.states = workspace;
  workspace = pack_tokens(student, tokens, width, workspace);
  chunk.states = workspace;
  for (std::int64_t c = 0; c < width; c += product::kPanel, workspace += tokens * product::kPanel)
    product::pack(student + c, width, nullptr, 0, tokens,
                  int(std::min<std::int64_t>(product::kPanel, width - c)), workspace);
  chunk.teacher.states = workspace;
  if (teacher) workspace = pack_tokens(teacher, tokens, chunk.teacher.width, workspace);
  chunk.scratch = workspace;
  if (chunk.d_weight && chunk.first)
    advise_huge_pages(chunk.d_weight, sizeof(float) * chunk.vocabulary * width);
  if (chunk.d_hidden)
    std::fill(chunk.d_hidden, chunk.d_hidden + chunk.threads * width * chunk.stride, 0.0f);
}

// Memory that is asked for a few lines at a time, while products run. The second sweep reads the
// head and the logits by columns, which no hardware prefetcher follows: 6 % of the whole loss on
// two threads. In the first sweep it brings nothing.
struct Ahead {
  const char *next, *end;

  Ahead(const void* from, std::int64_t bytes)
      : next(static_cast<const char*>(from)), end(next + bytes) {}
  void lines(int count) {
    for (; count > 0 && next < end; --count, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Calls body(part, begin, count) for all blocks of ids; a part is what one thread does.
template <typename Body>
inline void each_block(const Chunk& chunk, Body&& body) {
  const std::int64_t blocks = (chunk.vocabulary + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(chunk.threads) schedule(static, 1)
  for (int part = 0; part < chunk.threads; ++part)
    for (std::int64_t b = blocks * part / chunk.threads; b < blocks * (part + 1) / chunk.threads;
         ++b)
      body(part, b * kBlock, std::min<std::int64_t>(kBlock, chunk.vocabulary - b * kBlock));
}

// Logits of `count` ids: weight [count, width] * states [width, tokens].
inline void project(const Chunk& chunk, const Head& head, std::int64_t begin, std::int64_t count,
                    float* scratch, float* logits) {
  const product::Left weight = {head.rows(begin, count, scratch), head.width, 1};
  for (std::int64_t k = 0; k < head.width; k += kDepth)
    for (std::int64_t r = 0; r < count; r += product::kRows)
      for (std::int64_t t = 0; t < chunk.lanes(); t += product::kPanel)
        product::narrow_tile(
            weight.from(r, k), int(std::min<std::int64_t>(product::kRows, count - r)),
            head.states + t * head.width + k * product::kPanel, product::kPanel,
            int(std::min(kDepth, head.width - k)), k > 0, logits + r * chunk.stride + t,
            chunk.stride, int(std::min<std::int64_t>(product::kPanel, chunk.lanes() - t)));
}

// d_weight [count, width] = or += gradient [count, tokens] * states [tokens, width].
inline void add_to_weight(const Chunk& chunk, std::int64_t begin, std::int64_t count,
                          const float* gradient) {
  const std::int64_t width = chunk.student.width;
  Ahead ahead(as<const float>(chunk.student.weight) + begin * width,
              static_cast<DType>(chunk.student.dtype) == DType::f32 ? 4 * count * width : 0);
  for (std::int64_t r = 0; r < count; r += product::kRows)
    for (std::int64_t c = 0; c < width; c += product::kPanel) {
      ahead.lines(product::kRows * product::kPanel / 16);
      product::narrow_tile({gradient + r * chunk.stride, chunk.stride, 1},
                           int(std::min<std::int64_t>(product::kRows, count - r)),
                           chunk.states + c * chunk.tokens, product::kPanel, int(chunk.tokens),
                           !chunk.first, chunk.d_weight + (begin + r) * width + c, width,
                           int(std::min<std::int64_t>(product::kPanel, width - c)));
    }
}

// d_hidden^T [width, tokens] += weight^T [width, count] * gradient [count, tokens]. The logits of
// the next block are asked for: behind `gradient`, and behind `teacher`.
inline void add_to_hidden(const Chunk& chunk, int part, std::int64_t begin, std::int64_t count,
                          const float* gradient, const float* teacher) {
  const std::int64_t width = chunk.student.width;
  float* out = chunk.d_hidden + part * width * chunk.stride;
  const product::Left weight = {chunk.student.rows(begin, count, chunk.scratch_of(part)), 1, width};
  const std::int64_t block = count * chunk.stride;
  Ahead student_logits(gradient + block, 4 * block), teacher_logits(teacher + block, 4 * block);
  for (std::int64_t t = 0; t < chunk.lanes(); t += product::kPanel)
    for (std::int64_t c = 0; c < width; c += product::kRows) {
      student_logits.lines(6);
      teacher_logits.lines(6);
      product::narrow_tile(weight.from(c, 0),
                           int(std::min<std::int64_t>(product::kRows, width - c)), gradient + t,
                           chunk.stride, int(count), true, out + c * chunk.stride + t, chunk.stride,
                           int(std::min<std::int64_t>(product::kPanel, chunk.lanes() - t)));
    }
}
}  // namespace head_detail
