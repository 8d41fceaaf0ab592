"""The ops, each declared in one file; the name of the file is the name everywhere."""

from tailor_engine.ops._op import BACKENDS, OPS, Op, backend, unavailable
from tailor_engine.ops.block_influence import block_influence
from tailor_engine.ops.causal_attention import causal_attention
from tailor_engine.ops.channel_stats import channel_stats
from tailor_engine.ops.fake_quantize import fake_quantize
from tailor_engine.ops.gated_activation import gated_activation
from tailor_engine.ops.gram import gram
from tailor_engine.ops.int4_dequantize import int4_dequantize
from tailor_engine.ops.int4_linear import int4_linear
from tailor_engine.ops.int4_quantize import int4_quantize
from tailor_engine.ops.int8_linear import int8_linear
from tailor_engine.ops.int8_quantize import int8_quantize
from tailor_engine.ops.linear_kl import linear_kl
from tailor_engine.ops.linear_kl_topk import linear_kl_topk
from tailor_engine.ops.rms_norm import rms_norm
from tailor_engine.ops.rotary import rotary
from tailor_engine.ops.structured_slice import structured_slice

__all__ = [
    "BACKENDS",
    "OPS",
    "Op",
    "backend",
    "block_influence",
    "causal_attention",
    "channel_stats",
    "fake_quantize",
    "gated_activation",
    "gram",
    "int4_dequantize",
    "int4_linear",
    "int4_quantize",
    "int8_linear",
    "int8_quantize",
    "linear_kl",
    "linear_kl_topk",
    "rms_norm",
    "rotary",
    "structured_slice",
    "unavailable",
]
