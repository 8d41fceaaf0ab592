// What bindings.cpp sees of the kernels: addresses, sizes and a stream as plain integers, so that
// the host compiler needs no CUDA header.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace tailor {

using address = std::uintptr_t;

// The same numbers stand in tailor_engine/ops/_check.py and csrc/cpu/prelude.h.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// A launch that the driver refused; the bindings turn it into tailor_engine.errors.TailorError.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How a kernel is launched. Computed by a pure function of the problem, beside each kernel.
struct LaunchConfig {
  std::int64_t blocks;
  int threads;
};

LaunchConfig int4_dequantize_config(std::int64_t values);
void int4_dequantize(address data, address scale, address zero, std::int64_t values, int group,
                     address out, int dtype, address stream);
void int4_dequantize_panels(address data, address scale, address zero, int features, int width,
                            int group, address out, int dtype, address stream);

// What a launch may count on: multiprocessors, and the largest thread block cluster (1: none).
struct Machine {
  int multiprocessors;
  int largest_cluster;
};

// How small_batch.cuh cuts a product of few tokens; see small_batch.cpp for the reasons.
struct SmallBatchConfig {
  int tiles;         // of 8 tokens
  int warps_n;       // warps of a block that stand beside one another along N, 32 features each
  int warps_k;       // warps of a block that take turns along K
  int splits;        // blocks of a cluster that share K
  int blocks;        // of the whole grid
  int chunk_steps;   // steps of K whose tokens arrive together; four chunks are held at once
  int token_bytes;   // of shared memory that they take
  int shared_bytes;  // of a block, with the sums of its warps
};

constexpr int kSmallBatchRows = 16;      // tokens, at most
constexpr int kSmallBatchThreads = 256;  // of a block
constexpr int kSmallBatchHeader = 64;    // bytes of the workspace that hold the tokens' scales
constexpr int kSmallBatchPadding = 128;  // K of the quantized tokens is padded to a multiple

// element: bytes of one activation as it is multiplied, 1 (quantized) or 2.
SmallBatchConfig small_batch_config(int rows, int features, int width, int bits, int element,
                                    Machine machine);

// Bytes in which the tokens are quantized.
std::int64_t small_batch_workspace(int rows, int width);

// Addresses of one product y = x W^T + bias; 0 stands for an absent zero, bias or workspace.
struct Linear {
  address x;  // [rows, width], contiguous; for products without quantization at 16 bytes
  int dtype;  // of x and y
  int rows, width, features;
  address data, scale, zero;  // in the "cpu" layout of ops/_layout.py; data at 16, scale at 8 bytes
  address bias;
  int bias_dtype;
  address y;
  address workspace;  // at 16 bytes; 0: x itself is multiplied (bf16, f16)
};

void int4_linear(const Linear& linear, int group, Machine machine, address stream);
void int8_linear(const Linear& linear, Machine machine, address stream);

}  // namespace tailor
