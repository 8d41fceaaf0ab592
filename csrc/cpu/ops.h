// Every op of the CPU extension: its header, then its name. Included once per instruction-set
// level, inside that level's namespace and target region.
#include "vec.h"
#include "product.h"
#include "head.h"
#include "activations.h"
#include "octets.h"
#include "linear_tiles.h"

#include "block_influence.h"
#include "causal_attention.h"
#include "channel_stats.h"
#include "gated_activation.h"
#include "gram.h"
#include "int4_dequantize.h"
#include "int4_linear.h"
#include "int8_linear.h"
#include "int8_quantize.h"
#include "fake_quantize.h"
#include "int4_quantize.h"
#include "linear_config.h"
#include "linear_kl.h"
#include "linear_kl_topk.h"
#include "rms_norm.h"
#include "rotary.h"
#include "structured_slice.h"

#include "decode.h"

#define TAILOR_OPS(X) \
  X(block_influence)  \
  X(causal_attention) \
  X(channel_stats)    \
  X(fake_quantize)    \
  X(gated_activation) \
  X(gram)             \
  X(int4_dequantize)  \
  X(int4_linear)      \
  X(int4_quantize)    \
  X(int8_linear)      \
  X(int8_quantize)    \
  X(linear_kl)        \
  X(linear_kl_topk)   \
  X(rms_norm)         \
  X(rotary)           \
  X(structured_slice)

// Of several ops at once, see tailor_engine/decode.
#define TAILOR_STEPS(X) \
  X(decode_bytes)       \
  X(decode_step)
