// int8_linear for 1 to 16 quantized tokens: small_batch.cuh over 8-bit weights, exact in int32.
//
// Floor: N K + 8 N + 3 T (K + N) bytes / bandwidth, for T bf16 tokens that are read, written as
// codes and read again; 8192 x 8192 are 67.2 MB, 22.4 us at 3.0 TB/s. No instruction unpacks: a
// step of 2 KB takes about 100 a warp, a third of what the multiprocessors can issue meanwhile.
#include "small_batch.cuh"

namespace tailor {

void int8_linear(const Linear& linear, Machine machine, address stream) {
  launch_small_batch<8, std::int8_t, 0>("int8_linear", linear, machine, stream);
}

}  // namespace tailor
