// The shape of a launch, for the device's `launch` and the emulated one.
#pragma once

#include "ops.h"

namespace tailor {

struct Launch {
  std::int64_t blocks;
  int threads;
  address stream;
  int shared_bytes = 0;
  int cluster = 1;     // blocks that share their shared memory
  bool early = false;  // begins before the kernel before it has ended; see wait_for_kernel_before
};

}  // namespace tailor
