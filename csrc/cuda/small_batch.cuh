// y = x W^T + bias for 1 to 16 tokens and int4 or int8 weights: bound by the read of the weights.
//
// Floor: bytes of the weights and scales / bandwidth. 8192 x 8192 in 4 bits, group 128, is 34.6 MB:
// 11.5 us at 3.0 TB/s; in 8 bits 22.4 us. Little's law: 3.35 TB/s times 0.8 us are 20 KB in flight
// on each of 132 multiprocessors; here a thread holds four loads of 16 bytes, 16 to 24 warps
// 32 to 48 KB.
//
// The weight is the A operand of the tensor core, 16 features by 32 bytes of K; the tokens are B.
// The "cpu" layout of ops/_layout.py is the shuffle that this asks for: 16 bytes of a panel are 4
// features by 8 k (4 bits) or 4 k (8 bits). Lane (g, q) of a warp, g = lane / 4 and q = lane % 4,
// loads features 4 (g % 4) .. + 3 of panel g / 4 of two, at row q of four, and a warp's load is
// twice 256 contiguous bytes. Features 4i, 4i + 1 of a lane are rows g and g + 8 of one MMA, 4i + 2
// and 4i + 3 those of another. Which k stand where is free as long as A and B agree:
//
//   4 bits, int8 tokens    low nibbles of a word meet B's first four k, high nibbles the next four
//   4 bits, bf16 or f16    nibbles n and n + 4 make the pair n; 0, 2 then 1, 3 are A's pairs
//   8 bits, int8 tokens    two loads, 16 k apart, are A's first and second half
//
// A unit is 32 k of 32 features, a step the units of a thread's four loads. Technique: Marlin's
// offline shuffle and integer-to-float trick (Frantar et al., 2024), with the operands exchanged as
// in Machete; sums meet in a fixed order, first the warps of a block, then the blocks of a cluster.
#pragma once

#include "common.cuh"
#include "tokens.cuh"

namespace tailor {

// What a block needs to know; all counts in the units named above.
struct SmallBatch {
  const uint4* data;
  const void* scale;         // f16 of each group (4 bits), f32 of each feature (8 bits)
  const std::uint8_t* zero;  // of each group, or null: 8
  const float* token_scale;  // null: tokens are not quantized
  const char* x;
  const void* bias;
  void* y;
  DType dtype, bias_dtype;
  int rows, features, groups;
  int x_stride, x_bytes;  // of a token: from one to the next, and those that are there
  int word_rows;          // rows of 64 bytes in a panel
  int steps, share, chunk_steps, token_bytes;  // share: steps of a block, at most
  int splits, warps_k;
};

constexpr int kLoads = 4;      // 16-byte loads of a thread in flight
constexpr int kChunks = 4;     // of tokens in shared memory
constexpr int kStepRows = 16;  // rows of a panel in a step: kLoads times the four q

// Word i of a load.
__device__ inline unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// How a unit's weights and tokens become the operands of the tensor core.
template <int kBits, typename T>
struct Operands;

template <>
struct Operands<8, std::int8_t> {
  static constexpr int kProducts = 1, kUnitLoads = 2;
  static __device__ void weight(const uint4* held, const unsigned*, int half, int,
                                unsigned (&a)[4]) {
    for (int i = 0; i < 4; ++i) a[i] = word(held[i / 2], 2 * half + i % 2);
  }
};

template <>
struct Operands<4, std::int8_t> {
  static constexpr int kProducts = 1, kUnitLoads = 1;
  // code - zero in each byte: 128 + code - zero never borrows from a neighbour.
  static __device__ unsigned centred(unsigned codes, unsigned zeros) {
    return (insert_bits(codes, 0x0f0f0f0fu, 0x80808080u) - zeros) ^ 0x80808080u;
  }
  static __device__ unsigned spread(unsigned zeros, int i) {
    return permute_bytes(zeros, 0, 0x1111 * i);
  }
  static __device__ void weight(const uint4* held, const unsigned* zeros, int half, int,
                                unsigned (&a)[4]) {
    for (int i = 0; i < 4; ++i)
      a[i] = centred(word(held[0], 2 * half + i % 2) >> (i / 2 * 4), zeros[2 * half + i % 2]);
  }
};

template <typename T>
struct Operands<4, T> {
  static constexpr int kProducts = 2, kUnitLoads = 1;
  // 1024 (f16) and 128 (bf16) have an ulp of 1: or-ed with a code they are the sum, exactly.
  static constexpr unsigned kMagic = std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;
  static __device__ unsigned spread(unsigned zeros, int i) {
    return kMagic | permute_bytes(zeros, 0, 0x4040 + 0x0101 * i);
  }
  static __device__ void weight(const uint4* held, const unsigned* zeros, int half, int product,
                                unsigned (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
      const unsigned codes = word(held[0], 2 * half + i % 2) >> (4 * (product + i / 2 * 2));
      a[i] = subtract_pairs<T>(insert_bits(codes, 0x000f000fu, kMagic), zeros[2 * half + i % 2]);
    }
  }
};

// B of one unit and 8 tokens: `at` is the lane's place in shared memory.
__device__ inline void load_tokens(const char* at, unsigned (&b)[2]) {
  const uint2 v = *reinterpret_cast<const uint2*>(at);
  b[0] = v.x, b[1] = v.y;
}
__device__ inline void load_tokens(const char* at, unsigned (&b)[4]) {  // pairs 02 13, 46 57
  const uint4 v = *reinterpret_cast<const uint4*>(at);
  b[0] = permute_bytes(v.x, v.y, 0x5410), b[1] = permute_bytes(v.x, v.y, 0x7632);
  b[2] = permute_bytes(v.z, v.w, 0x5410), b[3] = permute_bytes(v.z, v.w, 0x7632);
}

// Scales (two f16 a word) and zero points (a byte each) of a lane's four features in one group.
struct Group {
  unsigned scale[2], zero;
  __device__ float scale_of(int i) const {
    const std::uint16_t bits = scale[i / 2] >> (i % 2 * 16);
    return to_float(reinterpret_cast<const __half&>(bits));
  }
};

// Reads group `number` of a lane's features; [K/G][16] a panel, [K/G][N % 16] the last one. Past
// the last group the tokens are 0, past the last feature nobody reads: any scale will do there.
__device__ inline void load_group(const SmallBatch& p, int panel, int number, Group& group) {
  const int width = p.features - 16 * panel, first = threadIdx.x / 4 % 4 * 4;
  const auto* scale = static_cast<const std::uint16_t*>(p.scale);
  number = min(number, p.groups - 1);
  group.zero = 0x08080808u;
  if (width >= 16) {
    const int at = (panel * p.groups + number) * 16 + first;
    const uint2 two = *reinterpret_cast<const uint2*>(scale + at);
    group.scale[0] = two.x, group.scale[1] = two.y;
    if (p.zero) group.zero = *reinterpret_cast<const unsigned*>(p.zero + at);
    return;
  }
  int at[4];
  for (int i = 0; i < 4; ++i)
    at[i] = panel * p.groups * 16 + number * width + min(first + i, width - 1);
  for (int i = 0; i < 2; ++i) group.scale[i] = scale[at[2 * i]] | scale[at[2 * i + 1]] << 16;
  if (p.zero)
    group.zero = p.zero[at[0]] | p.zero[at[1]] << 8 | p.zero[at[2]] << 16 | p.zero[at[3]] << 24;
}

// Starts the copies of the tokens of some steps into shared memory: [unit][token][32 k].
template <int kUnits, int kPieces>
__device__ inline void stage_tokens(const SmallBatch& p, int first, int last, char* shared) {
  const int of_token = (last - first) * kUnits * kPieces;  // pieces of 16 bytes
  for (int i = threadIdx.x; i < p.rows * of_token; i += kSmallBatchThreads) {
    const int token = i / of_token, piece = i % of_token;
    const int from = (first * kUnits * kPieces + piece) * 16;
    const int to = (piece / kPieces * p.rows + token) * kPieces + piece % kPieces;
    const bool inside = from < p.x_bytes;
    copy_async(shared + 16 * to, p.x + std::int64_t(token) * p.x_stride + (inside ? from : 0),
               inside);
  }
}

// Adds the sums of all warps and blocks that share K, in their order, and writes the outputs.
template <int kBits, int kTiles, typename Sum>
__device__ inline void finish(const SmallBatch& p, const Sum* sums) {
  const int warps_n = kSmallBatchThreads / 32 / p.warps_k;
  const int rank = blockIdx.x % p.splits, first = blockIdx.x / p.splits * warps_n * 32;
  for (int i = rank * kSmallBatchThreads + threadIdx.x; i < p.rows * warps_n * 32;
       i += p.splits * kSmallBatchThreads) {
    const int token = i / (warps_n * 32), feature = i % (warps_n * 32), n = first + feature;
    if (n >= p.features) continue;
    const Sum* own = sums + (feature / 32 * p.warps_k * kTiles * 8 + token) * 32 + feature % 32;
    Sum total = 0;
    for (int block = 0; block < p.splits; ++block)
      for (int warp = 0; warp < p.warps_k; ++warp)
        total += load_from_block(own + warp * kTiles * 8 * 32, block);
    float y = float(total);
    if (p.token_scale) y *= p.token_scale[token];
    if constexpr (kBits == 8) y *= static_cast<const float*>(p.scale)[n];
    if (p.bias) y += load_as(p.bias_dtype, p.bias, n);
    store_as(p.dtype, p.y, std::int64_t(token) * p.features + n, y);
  }
}

// T: of the tokens as they are multiplied. kGroup: 32, 64 or 128; 0 for 8 bits.
template <int kBits, typename T, int kTiles, int kGroup>
__global__ void __launch_bounds__(kSmallBatchThreads, kTiles == 1 ? 3 : 2)
    small_batch(const __grid_constant__ SmallBatch p) {
  using Operand = Operands<kBits, T>;
  using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, int, float>;  // of a group
  using Total = std::conditional_t<kBits == 8, int, float>;
  constexpr int kUnits = kLoads / Operand::kUnitLoads;  // of a step
  constexpr int kPieces = 2 * sizeof(T);                // 16 bytes each, of a token's unit
  constexpr int kGroups = kGroup ? 128 / kGroup : 1;    // of a step
  constexpr int kGroupUnits = kUnits / kGroups;

  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int warps_n = kSmallBatchThreads / 32 / p.warps_k, rank = blockIdx.x % p.splits;
  const int wanted = 2 * (blockIdx.x / p.splits * warps_n + warp / p.warps_k) + g / 4;
  const int panel = min(wanted, (p.features - 1) / 16);
  const int begin = min(rank * p.share, p.steps), end = min(begin + p.share, p.steps);

  // The first loads leave before anything else.
  const int place = (panel * p.word_rows + q) * 4 + g % 4;
  const int row_end = wanted == panel ? min(p.word_rows, end * kStepRows) - q : 0;
  // What lies past K or N keeps its old codes: tokens there are 0, sums there are not read.
  uint4 held[kLoads] = {};
  Group group[kGroups];
  const auto load = [&](int step, int i) {
    const int row = step * kStepRows + 4 * i;
    load_streaming(p.data + (place + row * 4), row < row_end, held[i]);
  };
  int step = begin + warp % p.warps_k;
  for (int i = 0; i < kLoads; ++i) load(step, i);
  if constexpr (kBits == 4)
    for (int i = 0; i < kGroups; ++i) load_group(p, panel, step * kGroups + i, group[i]);

  char* tokens = shared_memory();
  const int unit_bytes = p.rows * 32 * sizeof(T), chunk_bytes = p.chunk_steps * kUnits * unit_bytes;
  Total* sums = reinterpret_cast<Total*>(tokens + p.token_bytes);
  int lane_tokens[kTiles];  // columns past the last token repeat it; nobody reads their sums
  for (int t = 0; t < kTiles; ++t)
    lane_tokens[t] = (32 * min(8 * t + g, p.rows - 1) + 8 * q) * sizeof(T);
  Total total[2][kTiles][4] = {};
  wait_for_kernel_before();  // which quantizes the tokens
  // Four chunks in a ring, three on their way: behind the barrier all have left the one before.
#pragma unroll 1
  for (int chunk = 1 - kChunks; begin + chunk * p.chunk_steps < end; ++chunk) {
    if (chunk >= 0) {
      wait_for_copies<kChunks - 2>();
      __syncthreads();
    }
    const int ahead = chunk + kChunks - 1, from = min(begin + ahead * p.chunk_steps, end);
    stage_tokens<kUnits, kPieces>(p, from, min(from + p.chunk_steps, end),
                                  tokens + ahead % kChunks * chunk_bytes);
    commit_copies();
    if (chunk < 0) continue;
    const int first = begin + chunk * p.chunk_steps;
    const int step_0 = chunk % kChunks * chunk_bytes - first * kUnits * unit_bytes;
#pragma unroll 1
    for (; step < min(first + p.chunk_steps, end); step += p.warps_k) {
      const int next = step + p.warps_k;
      const char* at = tokens + (step_0 + step * kUnits * unit_bytes);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        Sum sum[2][kTiles][4] = {};
        unsigned zeros[4] = {};
        if constexpr (kBits == 4)
          for (int i = 0; i < 4; ++i) zeros[i] = Operand::spread(group[j].zero, i);
#pragma unroll
        for (int u = j * kGroupUnits; u < (j + 1) * kGroupUnits; ++u) {
          unsigned b[kTiles][2 * Operand::kProducts];
          for (int t = 0; t < kTiles; ++t) load_tokens(at + u * unit_bytes + lane_tokens[t], b[t]);
          for (int half = 0; half < 2; ++half)
            for (int product = 0; product < Operand::kProducts; ++product) {
              unsigned a[4];
              Operand::weight(held + u * Operand::kUnitLoads, zeros, half, product, a);
              for (int t = 0; t < kTiles; ++t)
                multiply<T>(sum[half][t], a, b[t][2 * product], b[t][2 * product + 1]);
            }
          for (int i = 0; i < Operand::kUnitLoads; ++i) load(next, u * Operand::kUnitLoads + i);
        }
        for (int half = 0; half < 2; ++half)
          for (int t = 0; t < kTiles; ++t)
            for (int i = 0; i < 4; ++i) {
              if constexpr (kBits == 8)
                total[half][t][i] += sum[half][t][i];
              else
                total[half][t][i] += float(sum[half][t][i]) * group[j].scale_of(2 * half + i / 2);
            }
        if constexpr (kBits == 4) load_group(p, panel, next * kGroups + j, group[j]);
      }
    }
  }

  // Element i of an MMA's sum is feature 4 (g % 4) + 2 half + i / 2, token 8 t + 2 q + i % 2.
  for (int t = 0; t < kTiles; ++t)
    for (int i = 0; i < 2; ++i) {
      Chunk<Total> four;
      for (int f = 0; f < 4; ++f) four.values[f] = total[f / 2][t][f % 2 * 2 + i];
      const int token = 8 * t + 2 * q + i;
      *reinterpret_cast<Chunk<Total>*>(sums + (warp * kTiles * 8 + token) * 32 + 4 * g) = four;
    }
  __syncthreads();
  if (p.splits > 1) synchronize_cluster();
  finish<kBits, kTiles>(p, sums);
  if (p.splits > 1) leave_cluster_together();  // a block's memory lives until all have read it
}

// Quantizes the tokens where there is a workspace, and launches the product.
template <int kBits, typename T, int kGroup>
void launch_small_batch(const char* op, const Linear& linear, Machine machine, address stream) {
  constexpr bool kQuantized = std::is_same_v<T, std::int8_t>;
  const SmallBatchConfig config =
      small_batch_config(linear.rows, linear.features, linear.width, kBits, sizeof(T), machine);
  SmallBatch p = {};
  p.data = reinterpret_cast<const uint4*>(linear.data);
  p.scale = reinterpret_cast<const void*>(linear.scale);
  p.zero = reinterpret_cast<const std::uint8_t*>(linear.zero);
  p.bias = reinterpret_cast<const void*>(linear.bias);
  p.y = reinterpret_cast<void*>(linear.y);
  p.dtype = static_cast<DType>(linear.dtype), p.bias_dtype = static_cast<DType>(linear.bias_dtype);
  p.rows = linear.rows, p.features = linear.features;
  p.groups = kGroup ? linear.width / (kGroup ? kGroup : 1) : 0;
  p.word_rows = kBits == 4 ? linear.width / 8 : (linear.width + 7) / 8 * 2;
  p.steps = (p.word_rows + kStepRows - 1) / kStepRows, p.chunk_steps = config.chunk_steps;
  p.token_bytes = config.token_bytes;
  p.share = (p.steps + config.splits - 1) / config.splits;
  p.splits = config.splits, p.warps_k = config.warps_k;
  Launch shape{config.blocks, kSmallBatchThreads, stream, config.shared_bytes, config.splits};
  if (kQuantized) {
    quantize_tokens_of<kBits == 8>(op, linear, stream);
    p.token_scale = reinterpret_cast<const float*>(linear.workspace);
    p.x = reinterpret_cast<const char*>(linear.workspace + kSmallBatchHeader);
    p.x_stride = p.x_bytes =
        int(small_batch_workspace(linear.rows, linear.width) - kSmallBatchHeader) / linear.rows;
    shape.early = machine.largest_cluster > 1;  // Hopper has both
  } else {
    p.x = reinterpret_cast<const char*>(linear.x);
    p.x_stride = p.x_bytes = linear.width * int(sizeof(T));
  }
  launch(op,
         config.tiles == 1 ? small_batch<kBits, T, 1, kGroup> : small_batch<kBits, T, 2, kGroup>,
         shape, p);
}

}  // namespace tailor
