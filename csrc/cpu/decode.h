// decode_step: one token through a whole quantized network, from its id to its logits, in one call
// and one parallel region.
//
// Every thread holds the residual stream and computes norms and codes itself, which costs less than
// to wait for another; the output features of a product, and the keys of attention, are shared out.
// Five meetings a block remain: after q, k and v, attention, its output, gate and up, and down.
#pragma once

#include "decode_network.h"
#include "decode_attention.h"

namespace decode_detail {
class Worker {
 public:
  Worker(const Network& network, const Layer* layers, address memory, Team& team, int thread,
         int threads)
      : n_(network),
        layers_(layers),
        team_(team),
        thread_(thread),
        threads_(threads),
        w_(network, memory, thread, threads) {}

  template <typename X>
  void run(std::int64_t token, std::int64_t place, float* logits) {
    embed(token);
    for (std::int64_t b = 0; b < n_.count; ++b) {
      const Block& block = n_.block(b);
      if (block.query.features) attention<X>(block, layers_[b], place);
      if (block.gate.features) feed_forward(block);
    }
    normalize(n_.final_norm);
    const auto [begin, end] = project({&n_.head}, logits);
    if (!n_.softcap) return;
    const F cap = F::set(float(n_.softcap));
    std::int64_t i = begin;
    for (; i + F::width <= end; i += F::width)
      (tanh(F::load(logits + i) / cap) * cap).store(logits + i);
    if (const int rest = int(end - i); rest > 0)
      store_part(tanh(load_part(logits + i, rest, cap) / cap) * cap, logits + i, rest);
  }

 private:
  struct Range {
    std::int64_t begin, end;
  };

  // This thread's share of some pieces of work.
  Range share(std::int64_t count) const {
    return {count * thread_ / threads_, count * (thread_ + 1) / threads_};
  }

  void meet() { team_.wait(phase_, threads_); }

  void embed(std::int64_t token) {
    const Product& p = n_.embedding;
    const float scale = float(n_.embedding_scale);
    const std::int64_t panel = token / kPanel, lane = token % kPanel;
    if (!p.groups) {
      const float step = as<const float>(p.scale)[token];
      const std::int8_t* codes =
          as<const std::int8_t>(p.weight) + (panel * ((p.width + 7) / 8 * 2) * kPanel + lane) * 4;
      for (std::int64_t k = 0; k < n_.hidden; ++k)
        w_.stream[k] = float(codes[k / 4 * 64 + k % 4]) * step * scale;
      return;
    }
    const std::int64_t lanes = std::min<std::int64_t>(kPanel, p.features - panel * kPanel),
                       first = panel * kPanel * p.groups + lane, size = p.width / p.groups;
    const std::uint8_t* bytes =
        as<const std::uint8_t>(p.weight) + (panel * (p.width / 8) * kPanel + lane) * 4;
    for (std::int64_t k = 0; k < n_.hidden; ++k) {
      const std::int64_t at = first + k / size * lanes;
      const int code = bytes[k / 8 * 64 + k % 4] >> (k % 8 / 4 * 4) & 15,
                zero = p.zero ? as<const std::uint8_t>(p.zero)[at] : 8;
      w_.stream[k] = float(code - zero) * to_float(as<const f16>(p.scale)[at]) * scale;
    }
  }

  void normalize(address weight) {
    norm_detail::row(w_.stream, as<const float>(weight), w_.input, n_.hidden, float(n_.epsilon),
                     float(n_.norm_offset));
    filled(n_.hidden);
  }

  void filled(std::int64_t features) { filled_ = features, coded_ = nullptr; }

  // Adds a half's output to the stream, through a norm of its own in some families.
  void add(address norm) {
    const float* x = w_.added;
    if (norm) {
      norm_detail::row(x, as<const float>(norm), w_.input, n_.hidden, float(n_.epsilon),
                       float(n_.norm_offset));
      x = w_.input;
    }
    for (std::int64_t i = 0; i < n_.hidden; ++i) w_.stream[i] += x[i];
  }

  // The codes of `input` for a product, with zeros up to its stored width; those of the last one
  // where both read them alike.
  const Activations& codes(const Product& p, int factor, bool halves) {
    const bool alike = coded_ && coded_->groups == p.groups && coded_->width == p.width &&
                       !coded_->zero == !p.zero;
    if (!alike) {
      Activations& a = w_.codes;
      a.rows = 1, a.width = p.width, a.stride = (p.width + 63) / 64 * 64;
      a.groups = std::max<std::int64_t>(1, p.groups);
      if (filled_ < p.width) std::fill(w_.input + filled_, w_.input + p.width, 0.0f);
      quantize_row(w_.input, a, 0, factor, halves);
      coded_ = &p;
    }
    return w_.codes;
  }

  template <typename Kernel>
  void tiles(const Kernel& kernel, const Product& p, const float* scale, Range range, float* y) {
    constexpr int kColumns = Kernel::kPanels * kPanel;
    const Activations& a = codes(p, kernel.factor(), Kernel::kHalves);
    const Output<float> output{y, p.features, scale, as<const float>(p.bias)};
    alignas(64) float tile[kColumns];
    for (std::int64_t t = range.begin; t < range.end; ++t) {
      kernel.template tile<1>(a, 0, t * Kernel::kPanels, tile);
      output.store(tile, kColumns, 1, 0, t * kColumns, a.scales);
    }
  }

  // Tiles of both kernels are equally wide.
  static constexpr int kColumns = int8_detail::Kernel::kPanels * kPanel;
  static_assert(kColumns == int4_detail::Kernel::kPanels * kPanel);
  static std::int64_t tiles_of(const Product& p) { return (p.features + kColumns - 1) / kColumns; }

  void multiply(const Product& p, Range range, float* y) {
    if (range.begin >= range.end) return;
    if (p.groups)
      return tiles(
          int4_detail::Kernel{as<const std::uint8_t>(p.weight), as<const std::uint16_t>(p.scale),
                              as<const std::uint8_t>(p.zero), p.features, p.width, p.groups},
          p, nullptr, range, y);
    tiles(int8_detail::Kernel{as<const std::int8_t>(p.weight), (p.features + kPanel - 1) / kPanel,
                              (p.width + 7) / 8 * 2},
          p, as<const float>(p.scale), range, y);
  }

  // This thread's share of the features of some products of `input`, one after the other in y;
  // returns which of them it computed (of a single product).
  Range project(std::initializer_list<const Product*> products, float* y) {
    std::int64_t total = 0, before = 0;
    for (const Product* p : products) total += tiles_of(*p);
    const Range mine = share(total);
    for (const Product* p : products) {
      const std::int64_t count = tiles_of(*p);
      multiply(*p,
               {std::max<std::int64_t>(0, mine.begin - before), std::min(count, mine.end - before)},
               y);
      y += p->features, before += count;
    }
    return {mine.begin * kColumns, std::min(mine.end * kColumns, (*products.begin())->features)};
  }

  // A head's values, normalized and turned.
  void place_head(const Block& block, address norm, std::int64_t place, const float* x, float* y) {
    const std::int64_t size = block.head_size;
    if (norm)
      norm_detail::row(x, as<const float>(norm), y, size, float(n_.epsilon), float(n_.norm_offset));
    else
      std::copy_n(x, size, y);
    if (block.cosine)
      rotary_detail::turn(y, as<const float>(block.cosine) + place * size,
                          as<const float>(block.sine) + place * size, y, size / 2);
  }

  // Writes the token's own key and value into the cache.
  template <typename X>
  void append(const Block& block, const Layer& layer, std::int64_t place) {
    const std::int64_t size = block.head_size;
    const float *key = w_.projected + block.heads * size, *value = key + block.groups * size;
    for (std::int64_t g = 0; g < block.groups; ++g) {
      const std::int64_t at = (g * layer.capacity + layer.length) * size;
      place_head(block, block.key_norm, place, key + g * size, w_.query);
      for (std::int64_t d = 0; d < size; ++d) {
        as<X>(layer.keys)[at + d] = from_float<X>(w_.query[d]);
        as<X>(layer.values)[at + d] = from_float<X>(value[g * size + d]);
      }
    }
  }

  template <typename X>
  void attention(const Block& block, const Layer& layer, std::int64_t place) {
    const std::int64_t size = block.head_size, repeats = block.heads / block.groups;
    normalize(block.attention_norm);
    project({&block.query, &block.key, &block.value}, w_.projected);
    meet();

    const Range keys = share(layer.length + 1 - layer.first());
    const bool last = thread_ == threads_ - 1;  // its keys end with the token's own
    if (last) append<X>(block, layer, place);
    const std::int64_t stride = n_.heads * (2 + n_.head_size);
    float* partial = w_.partial + thread_ * stride;
    for (std::int64_t h = 0; h < block.heads; ++h) {
      float* q = w_.query + h * size;
      place_head(block, block.query_norm, place, w_.projected + h * size, q);
      for (std::int64_t d = 0; d < size; ++d) q[d] *= float(block.scaling);
    }
    for (std::int64_t g = 0; g < block.groups; ++g) {
      const std::int64_t at = (g * layer.capacity + layer.first() + keys.begin) * size;
      for (std::int64_t h = g * repeats; h < (g + 1) * repeats;) {
        const int heads = int(std::min<std::int64_t>(kHeads, (g + 1) * repeats - h));
        with_rows<kHeads>(heads, [&](auto constant) {
          attend<decltype(constant)::value>(
              w_.query + h * size, as<const X>(layer.keys) + at, as<const X>(layer.values) + at,
              size, keys.end - keys.begin, float(n_.attention_softcap), partial + h * (2 + size),
              g + 1 < block.groups ? as<const X>(layer.keys) + at + layer.capacity * size
                                   : nullptr);
        });
        h += heads;
      }
    }
    meet();

    mix(w_.partial, stride, threads_, block.heads, size, w_.input);
    filled(block.heads * size);
    project({&block.output}, w_.added);
    meet();
    add(block.attention_out_norm);
  }

  void feed_forward(const Block& block) {
    normalize(block.mlp_norm);
    const std::int64_t width = block.gate.features;
    const Range mine = share(tiles_of(block.gate));
    multiply(block.gate, mine, w_.inner);
    multiply(block.up, mine, w_.up);
    const std::int64_t begin = mine.begin * kColumns, end = std::min(mine.end * kColumns, width);
    using gate_detail::Activation;
    if (begin < end && Activation(n_.activation) == Activation::silu)
      gate_detail::row<Activation::silu>(w_.inner + begin, w_.up + begin, w_.inner + begin,
                                         end - begin);
    else if (begin < end)
      gate_detail::row<Activation::gelu_tanh>(w_.inner + begin, w_.up + begin, w_.inner + begin,
                                              end - begin);
    meet();

    std::copy_n(w_.inner, width, w_.input);
    filled(width);
    project({&block.down}, w_.added);
    meet();
    add(block.mlp_out_norm);
  }

  const Network& n_;
  const Layer* layers_;
  Team& team_;
  const int thread_, threads_;
  Workspace w_;
  std::int64_t filled_ = 0;  // features in `input`
  const Product* coded_ = nullptr;
  int phase_ = 0;
};
}  // namespace decode_detail

// The bytes of workspace that decode_step needs.
inline std::int64_t decode_bytes(address network, int threads) {
  using namespace decode_detail;
  return Workspace(*as<const Network>(network), 0, 0, threads).bytes;
}

// network, layers: tables of decode_network.h; the cache's dtype is not f64. place: the token's, as
// its rotation counts; workspace: decode_bytes, at a multiple of 64; logits [features of the head]
// float. Appends to the layers.
inline void decode_step(address network, address layers, int dtype, std::int64_t token,
                        std::int64_t place, address workspace, address logits, int threads) {
  using namespace decode_detail;
  with_dtype(dtype, 0, [&](auto* typed) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (!std::is_same_v<X, double>) {
      const Network& n = *as<const Network>(network);
      Team team;
      const auto body = [&](int thread, int size) {
        Worker(n, as<const Layer>(layers), workspace, team, thread, size)
            .template run<X>(token, place, as<float>(logits));
      };
      if (threads == 1) {
        body(0, 1);
      } else {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());  // it may be fewer
      }
      for (std::int64_t b = 0; b < n.count; ++b) ++as<Layer>(layers)[b].length;
    }
  });
}
