// What config() says of a product, for the table and the tests of tailor_engine/ops/_linear_config.
#pragma once

// Writes path, rows and features of a tile, blocks of rows, k unpacked at a time, and threads.
inline void linear_config(int bits, std::int64_t rows, std::int64_t width, std::int64_t features,
                          int threads, address numbers) {
  const auto c = bits == 4 ? quantized::config<int4_detail::Kernel>(rows, width, features, threads)
                           : quantized::config<int8_detail::Kernel>(rows, width, features, threads);
  const std::int64_t found[] = {int(c.path),  c.tile_rows, c.tile_panels * quantized::kPanel,
                                c.row_blocks, c.chunk,     c.threads};
  std::copy(std::begin(found), std::end(found), as<std::int64_t>(numbers));
}

#define TAILOR_CONFIGS(X) X(linear_config)
