// The launch of a product of few tokens: pure, and the same for int4_linear and int8_linear.
//
// | choice      | value                              | reason                                    |
// |-------------|------------------------------------|-------------------------------------------|
// | tiles       | 1 up to 8 tokens, else 2           | an MMA has 8 columns                      |
// | blocks held | 3 a multiprocessor; 2 with 2 tiles | registers: 80 (128) a thread of 256       |
// | cut of K    | largest power of two with which    | one wave without a tail; with fewer warps |
// |             | all blocks are held at once        | too few bytes would be in flight          |
// | warps_n     | a block's bytes of x <= half the   | x comes from L2 once a block, and L2      |
// |             | bytes of its weights, unless that  | serves about twice what memory does       |
// |             | leaves multiprocessors idle        |                                           |
// | warps_k     | the other warps of the block       | their sums meet in its shared memory      |
// | splits      | the rest of the cut, at most 8     | a cluster of 8 is the portable limit      |
// | chunk_steps | a quarter of the block's K, or     | products begin with a quarter of x there; |
// |             | what the held blocks leave room to | four chunks are a ring                    |
#include <algorithm>

#include "ops.h"

namespace tailor {
namespace {

constexpr int kWarps = kSmallBatchThreads / 32;
constexpr int kStepWords = 16;  // 32-bit words of a feature in a warp's step of 2 KB
constexpr int kChunks = 4;      // as in small_batch.cuh

int divide_up(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The largest power of two that is no larger than x, and the smallest that is no smaller.
int power_below(int x) {
  int power = 1;
  while (2 * power <= x) power *= 2;
  return power;
}
int power_above(int x) { return x <= 1 ? 1 : 2 * power_below(x - 1); }

}  // namespace

SmallBatchConfig small_batch_config(int rows, int features, int width, int bits, int element,
                                    Machine machine) {
  SmallBatchConfig c = {};
  c.tiles = rows <= 8 ? 1 : 2;
  const int step = kStepWords * 32 / bits;  // values of K
  const int steps = divide_up(width, step), pairs = divide_up(features, 32);
  const int blocks_held = c.tiles == 1 ? 3 : 2, held = machine.multiprocessors * blocks_held;

  // Of all warps, those that share K.
  const int cut = power_below(std::min(steps, std::max(1, kWarps * held / pairs)));
  const auto cut_of = [&](int warps_n) {
    return std::min(cut, kWarps / warps_n * machine.largest_cluster);
  };
  // Bytes a value of K: of x rows * element, of the weights 32 * warps_n * bits / 8.
  c.warps_n = std::min(power_above(divide_up(rows * element, 2 * bits)), power_above(pairs));
  while (c.warps_n > 1 && pairs * cut_of(c.warps_n) < kWarps * machine.multiprocessors)
    c.warps_n /= 2;
  c.warps_k = std::min(cut_of(c.warps_n), kWarps / c.warps_n);
  c.splits = cut_of(c.warps_n) / c.warps_k;
  while (divide_up(steps, c.splits) * (c.splits - 1) >= steps) c.splits /= 2;  // all have work
  c.warps_n = kWarps / c.warps_k;
  c.blocks = divide_up(pairs, c.warps_n) * c.splits;

  const int step_bytes = rows * step * element, share = divide_up(steps, c.splits);
  const int sums = kWarps * c.tiles * 8 * 32 * 4;
  const int shared = (machine.largest_cluster > 1 ? 227 : 163) * 1024 / blocks_held - 1024;
  const int turns = std::max(1, (shared - sums) / kChunks / (step_bytes * c.warps_k));
  c.chunk_steps = std::min(divide_up(divide_up(share, kChunks), c.warps_k), turns) * c.warps_k;
  c.token_bytes = std::min(kChunks * c.chunk_steps, share) * step_bytes;
  c.shared_bytes = c.token_bytes + sums;
  return c;
}

std::int64_t small_batch_workspace(int rows, int width) {
  return kSmallBatchHeader +
         std::int64_t(rows) * divide_up(width, kSmallBatchPadding) * kSmallBatchPadding;
}

}  // namespace tailor
