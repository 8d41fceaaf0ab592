// How int8_linear and int4_linear work a product off: which loop, in which blocks, on how many
// threads; and the way from a tile of sums to the output.
//
// A task is a block of panels for a block of rows. Panels are packed so that a tile can multiply
// from memory ("tiles"), which is one stream for one or two rows ("gemv"). Many rows first unpack
// the panels into the first-level cache, in the form that the inner loop takes ("unpacked").
#pragma once

namespace quantized {
// Where the output goes: y[rows][features] = tile * token scale * feature scale + bias.
template <typename Y>
struct Output {
  Y* y;
  std::int64_t features;
  const float *feature_scale, *bias;  // either may be null

  // Asks for the lines that a tile will be stored to, so that they arrive while it is computed.
  void expect(int tile_columns, int rows, std::int64_t row, std::int64_t feature) const {
    const std::int64_t count = std::min<std::int64_t>(tile_columns, features - feature);
    for (int r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < count; c += 64 / std::int64_t(sizeof(Y)))
        __builtin_prefetch(y + (row + r) * features + feature + c, 1);
  }

  void store(const float* tile, int tile_columns, int rows, std::int64_t row, std::int64_t feature,
             const float* token_scale) const {
    const std::int64_t count = std::min<std::int64_t>(tile_columns, features - feature);
    for (int r = 0; r < rows; ++r) {
      const F s = F::set(token_scale[row + r]);
      Y* out = y + (row + r) * features + feature;
      for (std::int64_t c = 0; c < count; c += F::width) {
        const int lanes = int(std::min<std::int64_t>(F::width, count - c));
        const bool whole = lanes == F::width;
        const std::int64_t n = feature + c;
        F v = F::load(tile + r * tile_columns + c) * s;
        if (feature_scale)
          v = v * (whole ? F::load(feature_scale + n) : load_part(feature_scale + n, lanes, s));
        if (bias) v = v + (whole ? F::load(bias + n) : load_part(bias + n, lanes, s));
        if (whole)
          v.store(out + c);
        else
          store_part(v, out + c, lanes);
      }
    }
  }
};

// Asks for a line of the weight, into the first-level cache where it is read next, into the second
// where a block of several panels is read before it.
template <int R>
inline void fetch(const void* line) {
  __builtin_prefetch(line, 0, R <= 2 ? 3 : 2);
}

enum class Path : int { gemv, tiles, unpacked };

// Codes of k that are unpacked at a time: as many as 16 KB hold.
template <typename Kernel>
constexpr std::int64_t kChunk = (1 << 14) / (Kernel::kUnpackedBytes * Kernel::kUnpackedPanels);

// Rows of a task: their codes stay in the second-level cache while the panels pass, and unpacking
// costs 1 to 2 % of the products.
constexpr std::int64_t kRowBlock = 128;
constexpr std::size_t kHugeOutput = 8 << 20;

struct Config {
  Path path;
  int tile_rows, tile_panels;
  std::int64_t row_blocks, chunk;
  int threads;
};

// The reasons stand in tailor_engine/ops/_linear_config.py.
template <typename Kernel>
inline Config config(std::int64_t rows, std::int64_t width, std::int64_t features, int threads) {
  // Ten microseconds of products pay for a thread; less loses to a wait for one that is not
  // running.
  constexpr std::int64_t kGrain = 1000000;
  const bool unpacks = Kernel::kUnpackFrom && rows >= Kernel::kUnpackFrom;
  Config c;
  c.path = rows <= 2 ? Path::gemv : unpacks ? Path::unpacked : Path::tiles;
  c.tile_rows = int(std::min<std::int64_t>(unpacks ? Kernel::kUnpackedRows : Kernel::kRows, rows));
  c.tile_panels = unpacks ? Kernel::kUnpackedPanels : Kernel::kPanels;
  c.row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  c.chunk = unpacks ? std::min(kChunk<Kernel>, width) : width;
  c.threads = int(std::min<std::int64_t>(threads, 1 + rows * width * features / kGrain));
  return c;
}

// Calls f(row, number of rows as a constant) for tiles of at most R rows, all about equally high:
// 16 rows of at most 12 are two times 8.
template <int R, typename Function>
inline void in_tiles(std::int64_t begin, std::int64_t rows, Function&& f) {
  const std::int64_t tiles = (rows + R - 1) / R;
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t row = begin + rows * t / tiles;
    with_rows<R>(int(begin + rows * (t + 1) / tiles - row), [&](auto count) { f(row, count); });
  }
}

// The panels from `panel` on for a block of rows, multiplied as they lie in memory.
template <typename Kernel, typename Y>
inline void sweep_tiles(const Kernel& kernel, const Activations& a, std::int64_t begin,
                        std::int64_t rows, std::int64_t panel, const Output<Y>& output) {
  constexpr int kColumns = Kernel::kPanels * kPanel;
  alignas(64) float tile[Kernel::kRows * kColumns];
  in_tiles<Kernel::kRows>(begin, rows, [&](std::int64_t row, auto count) {
    constexpr int R = decltype(count)::value;
    output.expect(kColumns, R, row, panel * kPanel);
    // The first rows ask for what the next panels will need; the others would ask again.
    const std::int64_t next = row == begin ? Kernel::kPanels * kernel.panel_bytes() : 0;
    kernel.template tile<R>(a, row, panel, tile, R <= 2 ? Kernel::kAhead : next);
    output.store(tile, kColumns, R, row, panel * kPanel, a.scales);
  });
}

// The same through an unpacked copy of a chunk of k after the other; sums wait in memory between.
template <typename Kernel, typename Y>
inline void sweep_unpacked(const Kernel& kernel, const Activations& a, std::int64_t begin,
                           std::int64_t rows, std::int64_t panel, const Output<Y>& output) {
  constexpr int kPanels = Kernel::kUnpackedPanels, kColumns = kPanels * kPanel;
  constexpr std::int64_t chunk = kChunk<Kernel>;
  alignas(64) std::uint8_t codes[chunk * kPanels * Kernel::kUnpackedBytes];
  alignas(64) float sums[kRowBlock * kColumns];
  std::memset(sums, 0, std::size_t(rows) * kColumns * sizeof(float));
  const std::int64_t block = kPanels * kernel.panel_bytes();
  const bool last_block = (panel + kPanels) * kPanel >= output.features;
  head_detail::Ahead next(kernel.panel(panel) + block, last_block ? 0 : block);
  const int lines = int(1 + block / 64 * Kernel::kUnpackedRows / rows * chunk / a.width);
  for (std::int64_t k = 0; k < a.width; k += chunk) {
    const std::int64_t count = std::min(chunk, a.width - k);
    const bool last = k + count == a.width;
    kernel.unpack(panel, k, count, codes);
    in_tiles<Kernel::kUnpackedRows>(begin, rows, [&](std::int64_t row, auto r) {
      constexpr int R = decltype(r)::value;
      float* tile = sums + (row - begin) * kColumns;
      next.lines(lines);
      if (last) output.expect(kColumns, R, row, panel * kPanel);
      kernel.template add<R>(a, row, panel, k, count, codes, tile, last);
      if (last) output.store(tile, kColumns, R, row, panel * kPanel, a.scales);
    });
  }
}

// Quantizes x, then computes all tasks as config() says.
template <typename X, typename Y, typename Kernel>
inline void multiply(const X* x, std::int64_t x_stride, const Activations& a, const Kernel& kernel,
                     const Output<Y>& output, int threads) {
  const Config c = config<Kernel>(a.rows, a.width, output.features, threads);
  const std::int64_t columns = c.tile_panels * kPanel,
                     blocks = (output.features + columns - 1) / columns;
  // Its loops share out the work inside a parallel region, and do all of it outside of one.
  const auto body = [&] {
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < a.rows; ++r) {
      quantize_row(x + r * x_stride, a, r, kernel.factor(), Kernel::kHalves);
      if constexpr (Kernel::kOctets)
        if (a.rows > 2) kernel.regroup(a, r);
    }
#pragma omp for schedule(static) nowait
    for (std::int64_t task = 0; task < blocks * c.row_blocks; ++task) {
      const std::int64_t part = task / blocks, panel = task % blocks * c.tile_panels,
                         begin = a.rows * part / c.row_blocks,
                         rows = a.rows * (part + 1) / c.row_blocks - begin;
      if constexpr (Kernel::kUnpackFrom > 0)
        if (c.path == Path::unpacked) {
          sweep_unpacked(kernel, a, begin, rows, panel, output);
          continue;
        }
      sweep_tiles(kernel, a, begin, rows, panel, output);
    }
  };
  if (c.threads == 1) return body();
#pragma omp parallel num_threads(c.threads)
  body();
}

// Calls multiply with the types of x and y, which are the same one.
template <typename Kernel>
inline void dispatch(address x, int dtype, std::int64_t x_stride, const Activations& a,
                     const Kernel& kernel, address feature_scale, address bias, address y,
                     std::int64_t features, int threads) {
  with_dtype(dtype, x, [&](auto* typed) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (!std::is_same_v<X, double>) {
      const Output<X> output{as<X>(y), features, as<const float>(feature_scale),
                             as<const float>(bias)};
      // Every call of many rows writes new memory: 100 MB are 25,000 page faults of 4 KB.
      const std::size_t bytes = std::size_t(a.rows) * features * sizeof(X);
      if (bytes >= kHugeOutput) advise_huge_pages(as<X>(y), bytes);
      multiply(typed, x_stride, a, kernel, output, threads);
    }
  });
}
}  // namespace quantized
