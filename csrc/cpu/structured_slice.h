// structured_slice: the kept rows and columns of many matrices, copied bit for bit.
//
// A matrix is kFields numbers in a table of int64; its elements are words of 1, 2, 4 or 8 bytes,
// whatever they mean. Every thread takes its share of the rows of every matrix, without a barrier.
#pragma once

namespace slice_detail {
enum { kFrom, kTo, kRows, kColumns, kKeptRows, kKeptColumns, kRowStride, kColumnStride, kBytes };
constexpr int kFields = 9;  // strides in elements; kept indices are addresses, zero keeps all

template <typename Word>
inline void copy(const std::int64_t* field, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kBlock = 64;  // columns: a line each, where columns lie far apart
  const Word* from = as<const Word>(address(field[kFrom]));
  Word* to = as<Word>(address(field[kTo]));
  const auto* rows = as<const std::int64_t>(address(field[kKeptRows]));
  const auto* columns = as<const std::int64_t>(address(field[kKeptColumns]));
  const std::int64_t width = field[kColumns], stride = field[kColumnStride];
  const std::int64_t step = stride == 1 ? std::max<std::int64_t>(width, 1) : kBlock;
  for (std::int64_t left = 0; left < width; left += step) {
    const std::int64_t right = std::min(left + step, width);
    for (std::int64_t r = begin; r < end; ++r) {
      const Word* row = from + (rows ? rows[r] : r) * field[kRowStride];
      Word* target = to + r * width;
      if (!columns && stride == 1)
        std::memcpy(target, row, width * sizeof(Word));
      else if (!columns)
        for (std::int64_t c = left; c < right; ++c) target[c] = row[c * stride];
      else if (stride == 1)
#pragma GCC unroll 8
        for (std::int64_t c = left; c < right; ++c) target[c] = row[columns[c]];
      else
        for (std::int64_t c = left; c < right; ++c) target[c] = row[columns[c] * stride];
    }
  }
}

inline void matrix(const std::int64_t* field, int thread, int threads) {
  const std::int64_t rows = field[kRows];
  const std::int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
  switch (field[kBytes]) {
    case 1:
      return copy<std::uint8_t>(field, begin, end);
    case 2:
      return copy<std::uint16_t>(field, begin, end);
    case 4:
      return copy<std::uint32_t>(field, begin, end);
    case 8:
      return copy<std::uint64_t>(field, begin, end);
  }
}
}  // namespace slice_detail

inline void structured_slice(address table, std::int64_t matrices, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; ++thread)
    for (std::int64_t m = 0; m < matrices; ++m)
      slice_detail::matrix(as<const std::int64_t>(table) + m * slice_detail::kFields, thread,
                           threads);
}
