// int4_linear for 1 to 16 tokens: small_batch.cuh over 4-bit weights, by operand and group.
//
// Floor: N K / 2 + 2 N K / G (3 with zero points) + 2 T (K + N) bytes / bandwidth. To unpack 1024
// weights and multiply them takes about 80 instructions of a warp with bf16 tokens, 60 with int8
// ones; at 3.0 TB/s an H100 can issue 157 meanwhile.
#include "small_batch.cuh"

namespace tailor {
namespace {

template <typename T>
void by_group(const Linear& linear, int group, Machine machine, address stream) {
  const auto launch = group == 32   ? launch_small_batch<4, T, 32>
                      : group == 64 ? launch_small_batch<4, T, 64>
                                    : launch_small_batch<4, T, 128>;
  launch("int4_linear", linear, machine, stream);
}

}  // namespace

// group 32, 64 or 128; width a multiple of it.
void int4_linear(const Linear& linear, int group, Machine machine, address stream) {
  if (linear.workspace)
    by_group<std::int8_t>(linear, group, machine, stream);
  else if (static_cast<DType>(linear.dtype) == DType::f16)
    by_group<__half>(linear, group, machine, stream);
  else if (static_cast<DType>(linear.dtype) == DType::bf16)
    by_group<__nv_bfloat16>(linear, group, machine, stream);
  else
    throw CudaError("int4_linear: without quantization x must be bfloat16 or float16");
}

}  // namespace tailor
