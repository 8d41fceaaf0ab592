// structured_slice: the kept rows and columns of many matrices, copied bit for bit.
//
// A matrix is kFields numbers in a table of int64; its elements are words of 1, 2, 4 or 8 bytes,
// whatever they mean. Every thread takes its share of the rows of every matrix, without a barrier.
//
// Kept columns of contiguous rows are copied by steps: one load of a vector, one shuffle that
// closes the gaps, one store. The steps follow from the indices alone, so they are found once for
// all rows. Their stores overlap, so they go to a buffer in the first-level cache, which is copied
// on in whole lines.
#pragma once

namespace slice_detail {
enum {
  kFrom,
  kTo,
  kRows,
  kColumns,
  kKeptRows,
  kKeptColumns,
  kRowStride,
  kColumnStride,
  kBytes,
  kSourceColumns
};
constexpr int kFields = 10;  // strides in elements; kept indices are addresses, zero keeps all

// Bytes go past the cache, where what is written is larger than it: half a copy's traffic would
// else be reads of lines that are overwritten whole (rows of float32: 15-20 % faster).
inline void copy_past_cache(std::uint8_t* to, const std::uint8_t* from, std::int64_t bytes) {
  constexpr std::int64_t kStep = F::width * sizeof(float);
  std::int64_t i = std::min<std::int64_t>(bytes, -std::intptr_t(to) & (kStep - 1));
  std::memcpy(to, from, i);
  for (; i + kStep <= bytes; i += kStep)
    stream((float*)(to + i), F::load((const float*)(from + i)));
  std::memcpy(to + i, from + i, bytes - i);
}

// What a shuffle of this level moves: units of so many bytes, in a vector of so many bytes.
template <typename Word>
struct Vector {
#if defined(TAILOR_AVX512)
  static constexpr int unit = sizeof(Word), bytes = unit == 1 ? 16 : 64;
#elif defined(TAILOR_AVX2)
  static constexpr int unit = sizeof(Word) < 4 ? 1 : 4, bytes = unit == 1 ? 16 : 32;
#else
  static constexpr int unit = sizeof(Word), bytes = 16;
#endif
};

// Units of the vector at `from`, in this order, to `to`.
template <int unit, int bytes>
inline void shuffle(const void* from, const std::uint8_t* order, std::uint8_t* to) {
#if defined(TAILOR_AVX512)
  if constexpr (bytes == 64) {
    const __m512i v = _mm512_loadu_si512(from);
    if constexpr (unit == 2) {
      const __m256i narrow = _mm256_loadu_si256((const __m256i*)order);
      return _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(narrow), v));
    } else if constexpr (unit == 4) {
      const __m128i narrow = _mm_loadu_si128((const __m128i*)order);
      return _mm512_storeu_si512(to, _mm512_permutexvar_epi32(_mm512_cvtepu8_epi32(narrow), v));
    } else {
      const __m128i narrow = _mm_loadl_epi64((const __m128i*)order);
      return _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_cvtepu8_epi64(narrow), v));
    }
  }
#endif
#if defined(TAILOR_AVX2)
  if constexpr (bytes == 32) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)order));
    const __m256i v = _mm256_loadu_si256((const __m256i*)from);
    return _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(v, index));
  }
  if constexpr (bytes == 16) {
    const __m128i v = _mm_loadu_si128((const __m128i*)from);
    const __m128i index = _mm_loadu_si128((const __m128i*)order);
    return _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(v, index));
  }
#endif
  for (int i = 0; i < bytes / unit; ++i)
    std::memcpy(to + i * unit, (const char*)from + order[i] * unit, unit);
}

// The way of bytes that come in pieces to a contiguous target, of which all but its two ends is
// written in whole lines.
class Writer {
 public:
  Writer(void* to, bool past_cache) : to_((std::uint8_t*)to), past_cache_(past_cache) {}

  // Where the next bytes go; there is room for a vector behind them. It is handed back, longer, to
  // `advance`: kept in a register, for in memory it would be a chain of loads and stores.
  std::uint8_t* begin() { return buffer_ + filled_; }
  std::uint8_t* advance(std::uint8_t* end) {
    if (end < buffer_ + kBuffer) return end;
    filled_ = end - buffer_;
    write(filled_ - ((std::intptr_t(to_) + filled_) & 63));
    return begin();
  }
  void end(const std::uint8_t* end) { filled_ = end - buffer_; }
  void finish() {
    write(filled_);
    if (past_cache_) __sync_synchronize();  // such stores are not ordered by themselves
  }

 private:
  static constexpr std::int64_t kBuffer = 4096;

  void write(std::int64_t bytes) {
    if (past_cache_)
      copy_past_cache(to_, buffer_, bytes);
    else
      std::memcpy(to_, buffer_, bytes);
    to_ += bytes, filled_ -= bytes;
    std::memmove(buffer_, buffer_ + bytes, 64);  // less than a line is left
  }

  std::uint8_t* to_;
  bool past_cache_;
  std::int64_t filled_ = 0;
  alignas(64) std::uint8_t buffer_[kBuffer + 128];
};

// The steps of one matrix's kept columns, in any order.
template <typename Word>
class Steps {
  using V = Vector<Word>;

 public:
  // Returns whether there is room for all: for 30,000 columns that lie close together, there is.
  bool fill(const std::int64_t* kept, std::int64_t width, std::int64_t source_columns) {
    constexpr int lanes = V::bytes / sizeof(Word), parts = sizeof(Word) / V::unit;
    if (source_columns < lanes) return false;
    for (std::int64_t c = 0; c < width; ++count_) {
      if (count_ == kMost) return false;
      Step& step = steps_[count_];
      const std::int64_t from = std::min(kept[c], source_columns - lanes);
      int lane = 0;
      for (; lane < lanes && c < width; ++lane, ++c) {
        const std::int64_t at = kept[c] - from;
        if (at < 0 || at >= lanes) break;
        for (int part = 0; part < parts; ++part)
          step.order[lane * parts + part] = std::uint8_t(at * parts + part);
      }
      std::fill(step.order + lane * parts, std::end(step.order), std::uint8_t(0));
      step.from = std::int32_t(from), step.bytes = lane * int(sizeof(Word));
    }
    return true;
  }

  void apply(const Word* row, Writer& out) const {
    std::uint8_t* to = out.begin();
    for (const Step *step = steps_, *end = steps_ + count_; step < end; ++step) {
      shuffle<V::unit, V::bytes>(row + step->from, step->order, to);
      to = out.advance(to + step->bytes);
    }
    out.end(to);
  }

 private:
  static constexpr int kMost = 4096;
  struct Step {
    std::uint8_t order[V::bytes / V::unit];
    std::int32_t from, bytes;
  };
  Step steps_[kMost];
  int count_ = 0;
};

template <typename Word>
struct Matrix {
  const Word* from;
  Word* to;
  const std::int64_t *rows, *columns;
  std::int64_t width, row_stride, stride, source_columns;

  explicit Matrix(const std::int64_t* field)
      : from(as<const Word>(address(field[kFrom]))),
        to(as<Word>(address(field[kTo]))),
        rows(as<const std::int64_t>(address(field[kKeptRows]))),
        columns(as<const std::int64_t>(address(field[kKeptColumns]))),
        width(field[kColumns]),
        row_stride(field[kRowStride]),
        stride(field[kColumnStride]),
        source_columns(field[kSourceColumns]) {}
  const Word* row(std::int64_t r) const { return from + (rows ? rows[r] : r) * row_stride; }
};

// Fetches a row some 4 KB before it is copied: kept rows lie apart, and each would else begin with
// a wait for memory (one thread, every other row kept: one row ahead is 50 % faster than none, this
// another 13 %). For columns, where rows follow one another, it costs 5-20 %.
inline void fetch(const void* row, std::int64_t bytes) {
  constexpr std::int64_t kMost = 8192;
  for (std::int64_t b = 0; b < std::min(bytes, kMost); b += 64)
    __builtin_prefetch((const char*)row + b);
}

template <typename Word>
inline void copy_rows(const Matrix<Word>& m, std::int64_t begin, std::int64_t end,
                      bool past_cache) {
  const std::int64_t bytes = m.width * sizeof(Word), ahead = 1 + 4096 / bytes;
  for (std::int64_t r = begin; r < end; ++r) {
    if (m.rows && r + ahead < end) fetch(m.row(r + ahead), bytes);
    if (past_cache)
      copy_past_cache((std::uint8_t*)(m.to + r * m.width), (const std::uint8_t*)m.row(r), bytes);
    else
      std::memcpy(m.to + r * m.width, m.row(r), bytes);
  }
  if (past_cache) __sync_synchronize();  // such stores are not ordered by themselves
}

// Columns that lie far apart: blocks of them, so that the lines of a block stay in the cache.
template <typename Word>
inline void copy_strided(const Matrix<Word>& m, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t left = 0; left < m.width; left += kBlock) {
    const std::int64_t right = std::min(left + kBlock, m.width);
    for (std::int64_t r = begin; r < end; ++r) {
      const Word* row = m.row(r);
      Word* target = m.to + r * m.width;
      for (std::int64_t c = left; c < right; ++c)
        target[c] = row[(m.columns ? m.columns[c] : c) * m.stride];
    }
  }
}

template <typename Word>
inline void copy_columns(const Matrix<Word>& m, std::int64_t begin, std::int64_t end,
                         bool past_cache) {
  Steps<Word> steps;
  if (!steps.fill(m.columns, m.width, m.source_columns)) return copy_strided(m, begin, end);
  Writer out(m.to + begin * m.width, past_cache);
  for (std::int64_t r = begin; r < end; ++r) steps.apply(m.row(r), out);
  out.finish();
}

template <typename Word>
inline void copy(const std::int64_t* field, int thread, int threads, bool past_cache) {
  const std::int64_t rows = field[kRows];
  const std::int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
  const Matrix<Word> m(field);
  if (begin == end || !m.width) return;  // an empty tensor has no memory to point to
  if (m.stride != 1) return copy_strided(m, begin, end);
  return m.columns ? copy_columns(m, begin, end, past_cache) : copy_rows(m, begin, end, past_cache);
}

inline void matrix(const std::int64_t* field, int thread, int threads, bool past_cache) {
  switch (field[kBytes]) {
    case 1:
      return copy<std::uint8_t>(field, thread, threads, past_cache);
    case 2:
      return copy<std::uint16_t>(field, thread, threads, past_cache);
    case 4:
      return copy<std::uint32_t>(field, thread, threads, past_cache);
    case 8:
      return copy<std::uint64_t>(field, thread, threads, past_cache);
  }
}
}  // namespace slice_detail

inline void structured_slice(address table, std::int64_t matrices, int threads) {
  using namespace slice_detail;
  // Bytes written from which on they go past the cache: it is soon full of what was read anyway
  // (kept columns of 8 x 576x1536, 7 and 14 MB: 12-20 % faster than through it).
  constexpr std::int64_t kCache = 4 << 20;
  const std::int64_t* fields = as<const std::int64_t>(table);
  std::int64_t written = 0;
  for (const auto* f = fields; f < fields + matrices * kFields; f += kFields) {
    const std::int64_t bytes = f[kRows] * f[kColumns] * f[kBytes];
    advise_huge_pages(as<void>(address(f[kTo])), bytes);
    written += bytes;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; ++thread)
    for (std::int64_t m = 0; m < matrices; ++m)
      matrix(fields + m * kFields, thread, threads, written > kCache);
}
