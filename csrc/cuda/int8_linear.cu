// int8_linear for 1 to 16 quantized tokens: small_batch.cuh over 8-bit weights, exact in int32.
#include "small_batch.cuh"

namespace tailor {

void int8_linear(const Linear& linear, Machine machine, address stream) {
  launch_small_batch<8, std::int8_t, 0>("int8_linear", linear, machine, stream);
}

}  // namespace tailor
