// The primitives of csrc/cuda/device.cuh on the host, so that tests run the kernels' own source.
//
// The threads of a cluster are fibers that take turns: each runs until it waits at a barrier of its
// warp, block or cluster, in one of two orders. Shared memory starts as NaN and is as large as the
// launch says, so with the address sanitizer every access out of bounds stops the run. Copies into
// it land where the kernel waits for them, no earlier; in the other order at once. Fragments of the
// tensor core are gathered from the 32 lanes by the tables of the PTX manual (mma.m16n8k16,
// mma.m16n8k32). A kernel in which nobody can go on, a barrier that some threads never reach, is an
// error.
#pragma once

#include <immintrin.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x;
};
using std::max;
using std::min;

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
inline __half __float2half_rn(float x) { return {std::uint16_t(_cvtss_sh(x, 0))}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7fff};
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace tailor {
namespace emulate {

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  std::uint32_t slots[32][6];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  int shared_bytes;
};

struct Copy {
  char* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  unsigned thread, block;
  Block* home;
  Warp* warp;
  bool done = false;
  std::vector<Copy> open;                 // copies that no group holds yet
  std::deque<std::vector<Copy>> pending;  // groups, the oldest first
};

constexpr std::size_t kStack = 128 << 10;
inline ucontext_t scheduler;
inline Fiber* current;
inline std::vector<Block>* cluster;
inline Barrier cluster_barrier;
inline bool progress;
inline bool reversed;  // the other order: from the last thread to the first
inline std::function<void()> body;
inline const void* scheduler_stack;
inline std::size_t scheduler_size;

inline void yield() {
  void* fake;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
  swapcontext(&current->context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}

inline void open_if_full(Barrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.arrived == 0) return;
  barrier.arrived = 0;
  ++barrier.generation;
  progress = true;
}

inline void wait(Barrier& barrier) {
  const long mine = barrier.generation;
  ++barrier.arrived;
  open_if_full(barrier);
  while (barrier.generation == mine) yield();
}

inline void forget(Block& block) { std::memset(block.shared.get(), 0xff, block.shared_bytes); }

inline void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  body();
  for (Barrier* barrier : {&current->warp->barrier, &current->home->barrier, &cluster_barrier}) {
    --barrier->expected;  // those who have left are waited for no more
    open_if_full(*barrier);
  }
  if (current->home->barrier.expected == 0) forget(*current->home);  // a block takes it along
  current->done = progress = true;
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
  swapcontext(&current->context, &scheduler);
}

inline dim3 thread_index() { return {current->thread}; }
inline dim3 block_index() { return {current->block}; }

// Every lane gives words and sees those of all lanes; the second wait keeps them until all did.
template <typename Use>
void exchange(const std::uint32_t* words, int count, const Use& use) {
  Warp& warp = *current->warp;
  std::copy_n(words, count, warp.slots[current->thread % 32]);
  wait(warp.barrier);
  use(warp.slots);
  wait(warp.barrier);
}

inline void resume(Fiber& fiber) {
  if (fiber.done) return;
  current = &fiber;
  void* fake;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

// A warp runs as far ahead of its block as barriers let it, and a block of its cluster: a missing
// barrier is seen.
inline void run_cluster(std::deque<Fiber>& fibers, int count, int threads) {
  const auto run_while_it_goes_on = [](const auto& round) {
    bool any = false;
    do {
      progress = false;
      round();
      any |= progress;
    } while (progress);
    progress = any;
  };
  const auto run_range = [&](int first, int size, int part, const auto& inner) {
    bool any = false;
    for (int at = first; at < first + size; at += part) {
      run_while_it_goes_on([&] { inner(at); });
      any |= progress;
    }
    progress = any;
  };
  const auto run_warp = [&](int first) {
    for (int i = first; i < first + 32; ++i) resume(fibers[reversed ? count - 1 - i : i]);
  };
  const auto run_block = [&](int first) { run_range(first, threads, 32, run_warp); };
  run_while_it_goes_on([&] { run_range(0, count, threads, run_block); });
  for (int i = 0; i < count; ++i)
    if (!fibers[i].done)
      throw CudaError("emulated kernel: some threads wait at a barrier for ever");
}

inline void run(std::int64_t blocks, int threads, int shared_bytes, int size) {
  if (blocks % size || threads % 32) throw CudaError("emulated kernel: impossible launch");
  static std::deque<Fiber> fibers;
  const int count = size * threads;
  while (int(fibers.size()) < count) fibers.emplace_back();
  for (std::int64_t first = 0; first < blocks; first += size) {
    std::vector<Block> homes(size);
    cluster = &homes;
    cluster_barrier = {size * threads};
    for (Block& home : homes) {
      home.barrier.expected = threads;
      home.warps.resize(threads / 32);
      for (Warp& warp : home.warps) warp.barrier.expected = 32;
      home.shared.reset(new char[shared_bytes]);
      home.shared_bytes = shared_bytes;
      forget(home);
    }
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = fibers[i];
      fiber.thread = i % threads, fiber.block = unsigned(first + i / threads);
      fiber.home = &homes[i / threads], fiber.warp = &fiber.home->warps[fiber.thread / 32];
      fiber.done = false, fiber.open.clear(), fiber.pending.clear();
      if (!fiber.stack)  // kept for the next launch; mapped, for malloc here fills what it gives
        fiber.stack =
            mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, enter, 0);
    }
    run_cluster(fibers, count, threads);
  }
}

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Value `number` of a 32-bit register that holds 4 or 2 of T.
template <typename T>
auto element(std::uint32_t bits, int number) {
  if constexpr (std::is_same_v<T, std::int8_t>)
    return std::int32_t(std::int8_t(bits >> (8 * number)));
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float({std::uint16_t(bits >> (16 * number))});
  else
    return __bfloat162float({std::uint16_t(bits >> (16 * number))});
}

}  // namespace emulate

#define threadIdx (::tailor::emulate::thread_index())
#define blockIdx (::tailor::emulate::block_index())

inline void __syncthreads() { emulate::wait(emulate::current->home->barrier); }
inline void synchronize_cluster() { emulate::wait(emulate::cluster_barrier); }
inline void leave_cluster_together() { synchronize_cluster(); }
inline char* shared_memory() { return emulate::current->home->shared.get(); }
inline void wait_for_kernel_before() {}
inline void let_next_kernel_begin() {}

template <typename T>
T __ldg(const T* source) {
  return *source;
}

inline void require_aligned(const void* pointer, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes)
    throw CudaError("emulated kernel: misaligned access");
}

inline void load_streaming(const uint4* source, bool inside, uint4& v) {
  require_aligned(source, 16);
  if (inside) v = *source;
}

inline void land(const emulate::Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}
inline void copy_async(void* shared, const void* source, bool inside) {
  require_aligned(shared, 16), require_aligned(source, 16);
  const emulate::Copy copy = {static_cast<char*>(shared), inside ? source : nullptr};
  if (emulate::reversed)
    land(copy);
  else
    emulate::current->open.push_back(copy);
}
inline void commit_copies() {
  emulate::current->pending.push_back(std::move(emulate::current->open));
  emulate::current->open.clear();
}
template <int kOpen>
void wait_for_copies() {
  auto& pending = emulate::current->pending;
  for (; pending.size() > kOpen; pending.pop_front())
    for (const emulate::Copy& copy : pending.front()) land(copy);
}

inline unsigned permute_bytes(unsigned a, unsigned b, unsigned order) {
  const std::uint64_t both = std::uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(both >> (8 * (order >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}

inline unsigned insert_bits(unsigned word, unsigned mask, unsigned bits) {
  return (word & mask) | bits;
}

template <typename T>
unsigned subtract_pairs(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 2; ++i) {
    const float difference = emulate::element<T>(a, i) - emulate::element<T>(b, i);
    if constexpr (std::is_same_v<T, __half>)
      result |= unsigned(__float2half_rn(difference).bits) << (16 * i);
    else
      result |= unsigned(__float2bfloat16_rn(difference).bits) << (16 * i);
  }
  return result;
}

// A register of A holds 4 bytes of a row: rows g and g + 8, then the same rows 16 bytes on; of B
// the 4 bytes of a column, then those 16 bytes on; lane 4 g + q gives place q of them.
template <typename T, typename Sum>
void multiply(Sum (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const std::uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const int lane = emulate::current->thread % 32;
  emulate::exchange(words, 6, [&](const std::uint32_t (&slots)[32][6]) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int half = 0; half < 2; ++half)
        for (int q = 0; q < 4; ++q) {
          const std::uint32_t left = slots[row % 8 * 4 + q][half * 2 + row / 8];
          const std::uint32_t right = slots[column * 4 + q][4 + half];
          for (int e = 0; e < int(4 / sizeof(T)); ++e)
            sum[i] += emulate::element<T>(left, e) * emulate::element<T>(right, e);
        }
    }
  });
}

template <typename T>
T shuffle(T value, int from) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  T result;
  emulate::exchange(&bits, 1, [&](const std::uint32_t (&slots)[32][6]) {
    std::memcpy(&result, &slots[from & 31][0], 4);
  });
  return result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return shuffle(value, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle(value, int(emulate::current->thread % 32) ^ mask);
}

template <typename T>
T load_from_block(const T* own, int rank) {
  const auto place = reinterpret_cast<const char*>(own) - shared_memory();
  return *reinterpret_cast<const T*>((*emulate::cluster)[rank].shared.get() + place);
}

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), const Launch& shape,
            const Arguments&... arguments) {
  emulate::reversed = shape.stream != 0;  // the tests' only use of a stream
  emulate::body = [&] { kernel(arguments...); };
  emulate::run(shape.blocks, shape.threads, shape.shared_bytes, shape.cluster);
}

}  // namespace tailor
