// What a decode step must know of a network and of its cache: tables of addresses and shapes,
// filled by Python at load. tailor_engine/decode/_plan.py mirrors every structure field by field.
#pragma once

namespace decode_detail {
using namespace quantized;

// A packed weight in the layout of its kernel; no features: there is none.
struct Product {
  address weight, scale, zero, bias;     // zero, bias: or 0
  std::int64_t features, width, groups;  // width as it is stored; no groups: int8
};

// One transformer block; a half without query or gate is left out.
struct Block {
  Product query, key, value, output, gate, up, down;
  address attention_norm, attention_out_norm, mlp_norm, mlp_out_norm, query_norm, key_norm;
  address cosine, sine;  // [places][head size], or 0: no rotation
  std::int64_t heads, groups, head_size;
  double scaling;
};

// Keys and values of a block, [groups][capacity][head size]; `length` tokens are there, and the
// step appends its own. A window counts the keys that a token sees with its own; none: 0.
struct Layer {
  address keys, values;
  std::int64_t capacity, length, window;

  std::int64_t first() const { return window ? std::max<std::int64_t>(0, length + 1 - window) : 0; }
};

struct Network {
  address blocks;
  std::int64_t count, hidden, activation;
  Product embedding, head;
  address final_norm;
  double embedding_scale, epsilon, norm_offset, softcap, attention_softcap;  // softcap 0: none
  // The largest of any block, which the workspace must hold.
  std::int64_t widest, projected, heads, head_size, scales;

  const Block& block(std::int64_t index) const { return as<const Block>(blocks)[index]; }
};

// The threads of a step meet between its phases, some 150 times a token. A thread that waits for
// longer than a sleep and its wake take sleeps: whom it waits for may need this very core. To yield
// instead may give the core to another process for a whole slice.
class Team {
 public:
  void wait(int& phase, int size) {
    if (size == 1) return;
    ++phase;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase);  // before asleep_ is read, as a sleeper counts before it reads phase_
      if (asleep_.load()) wake(phase_);
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins, relax())
      if (phase_.load(std::memory_order_acquire) == phase) return;
    ++asleep_;
    while (phase_.load() != phase) sleep(phase_, phase - 1);
    --asleep_;
  }

 private:
  static constexpr int kSpins = 512;  // 10 to 20 us

  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // takes about as long; its `yield` takes no time
#endif
  }

#if defined(__linux__)
  static_assert(sizeof(std::atomic<int>) == sizeof(int));
  // Returns when woken, at once where the value is another, and now and then for no reason.
  static void sleep(std::atomic<int>& value, int expected) {
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
  }
  static void wake(std::atomic<int>& value) {
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
#else
  static void sleep(std::atomic<int>&, int) { std::this_thread::yield(); }
  static void wake(std::atomic<int>&) {}
#endif

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  alignas(64) std::atomic<int> asleep_{0};
};

// The memory of a step: what all threads share, and each thread's own.
struct Workspace {
  float* projected;   // query, key and value of the token
  float* partial;     // [threads][heads][2 + head size]: see decode_attention.h
  float *inner, *up;  // of the feed-forward layer
  float* added;       // what a half of a block adds to the stream
  // Own.
  float *stream, *input, *query;
  Activations codes;
  std::int64_t bytes;  // of all

  Workspace(const Network& n, address memory, int thread, int threads) {
    std::int64_t used = 0;
    const auto take = [&](std::int64_t size) {
      const auto found = reinterpret_cast<char*>(memory) + used;
      used += (size + 127) / 64 * 64;  // a line between any two
      return found;
    };
    const auto floats = [&](std::int64_t count) { return (float*)take(4 * count); };
    projected = floats(n.projected);
    partial = floats(threads * n.heads * (2 + n.head_size));
    inner = floats(n.widest), up = floats(n.widest), added = floats(n.widest);
    for (int t = 0; t < threads; ++t) {
      float *const one = floats(n.widest), *const two = floats(n.widest),
                   *const three = floats(n.heads * n.head_size);
      char* const quantized = take(3 * n.widest + 4 * n.scales + 4);
      if (t != thread) continue;
      stream = one, input = two, query = three;
      codes.halves = (std::int16_t*)quantized;
      codes.codes = (std::int8_t*)(quantized + 2 * n.widest);
      codes.sums = (std::int32_t*)(quantized + 3 * n.widest);
      codes.scales = (float*)(quantized + 3 * n.widest + 4 * n.scales);
    }
    bytes = used;
  }
};
}  // namespace decode_detail
