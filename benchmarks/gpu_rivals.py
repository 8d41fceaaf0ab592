"""Whom each op is timed against on a GPU; one that cannot be imported is listed, not an error."""

import functools
import math

import torch
from torch.nn import functional

from tailor_engine.ops import OPS
from tailor_engine.ops._layout import unpack_nibbles
from tailor_engine.ops.int4_linear import canonical

from . import peers
from .peers import Peer, copied, size

COMPILED = ("block_influence", "channel_stats", "linear_kl")  # a compilation takes seconds
GEMLITE_TOKENS = 64  # above, nobody would multiply by packed weights


def rivals(name, arguments, first):
    """Return {rival: Peer}; `first` says that this is the op's first shape, which compiles.

    A Peer that cannot be made raises when it is made: see gpu_times.
    """
    found = _RIVALS.get(name, _plain)(name, *arguments)
    if first and name in COMPILED:
        found |= {"torch.compile": _compiled(name, arguments)}
    return found


def _peer(function, *arguments):
    return Peer(lambda: functools.partial(function, *copied(arguments)), size(arguments))


def _plain(name, *arguments):
    """The declaration's own expression."""
    return {"torch": _peer(OPS[name].reference, *arguments)}


def _compiled(name, arguments):
    if name != "linear_kl":
        return _peer(_compile(OPS[name].reference), *arguments)
    loss, wanted = _compile(_plain_loss(*arguments[6:8])), arguments[-2:]
    return _peer(peers._with_gradients(loss, wanted), *arguments[:4])


def _compile(function):
    return torch.compile(function, dynamic=False)


def _dense(x, features):
    weight = torch.randn(features, x.shape[-1], device=x.device, dtype=torch.float32)
    return _peer(functional.linear, x, weight.to(x.dtype))


def _int4_linear(name, x, data, scale, zero, bias, group, layout, quantized):
    features, width = scale.shape[0], x.shape[-1]
    found = {"torch bf16": _dense(x, features)}
    if x.shape[0] <= GEMLITE_TOKENS:
        packed = features * width / 2
        weight = canonical(data, scale, zero, layout, width)
        codes = unpack_nibbles(weight[0])
        found["gemlite"] = Peer(lambda: _gemlite(x, codes, weight[1], group), packed)
        found["marlin (fp16)"] = Peer(lambda: _marlin(x, features, group), packed)
    return found


def _gemlite(x, codes, scale, group):
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinear, set_autotune

    set_autotune("fast")  # the full search takes minutes a shape
    kind = TORCH_TO_DTYPE[x.dtype]
    layer = GemLiteLinear(
        4, group_size=group, in_features=x.shape[-1], out_features=codes.shape[0],
        input_dtype=kind, output_dtype=kind,
    )  # fmt: skip
    zeros = torch.full_like(scale, 8.0)
    layer.pack(codes.to(torch.uint8), scale.to(x.dtype), zeros.to(x.dtype), None)
    return functools.partial(layer, x.clone())


def _marlin(x, features, group):
    import marlin

    layer = marlin.Layer(x.shape[-1], features, groupsize=group).to(x.device)
    layer.B.random_(-(2**31), 2**31 - 1)
    layer.s.fill_(0.01)
    return functools.partial(layer, x.half())


def _int8_linear(name, x, data, scale, bias, layout, quantized):
    found = {"torch bf16": _dense(x, scale.shape[0])}
    if quantized and x.shape[0] > 16:  # torch._int_mm takes no fewer
        codes, weight = (
            torch.randint(-127, 128, (rows, x.shape[-1]), device=x.device).to(torch.int8)
            for rows in (x.shape[0], scale.shape[0])
        )
        product = _peer(lambda codes, weight: torch._int_mm(codes, weight.t()), codes, weight)
        found["torch._int_mm alone"] = product
    return found


def _gram(name, x, mask, out):
    def product(x):
        return x.T @ x

    found = {"torch product": _peer(product, x)}
    if x.dtype != torch.float32:
        found["torch fp32"] = _peer(lambda x, out: out.addmm_(x.float().T, x.float()), x, out)
    return found


def _structured_slice(name, weights, rows, columns):
    found = peers.peers(name, (weights, rows, columns))
    return {"torch index_select": found["torch index_select"], "clone": found["memcpy"]}


def _linear_kl(name, *arguments):
    """Plain loss, and the products alone; Liger's fused one, whose ends of beta are the KLs."""
    (divergence, temperature), inputs, wanted = arguments[6:8], arguments[:4], arguments[-2:]
    beta = {"forward": 0.0, "jensen_shannon": 0.5}[divergence]
    loss = peers._with_gradients(_plain_loss(divergence, temperature), wanted)
    return {
        "torch": _peer(loss, *inputs),
        "its four products": _products(inputs[:2], inputs[2:], wanted),
        "Liger": Peer(lambda: _liger(beta, temperature, *copied(inputs)), size(inputs)),
    }


def _plain_loss(divergence, temperature):
    def loss(states, weight, teacher_states, teacher_weight):
        log_p = peers._log_probabilities(states, weight, temperature)
        log_q = peers._log_probabilities(teacher_states, teacher_weight, temperature)
        kl = functools.partial(functional.kl_div, log_target=True, reduction="sum")
        if divergence == "forward":
            return kl(log_p, log_q)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return 0.5 * (kl(log_m, log_p) + kl(log_m, log_q))

    return loss


def _products(student, teacher, wanted):
    """Return the Peer of a loss's products, all tokens at once."""
    products = functools.partial(peers._products_in_chunks, len(student[0]), wanted)
    return _peer(products, student, teacher)


def _linear_kl_topk(name, *arguments):
    found = {"torch": peers.peers(name, arguments)["torch"]}
    return found | {"its three products": _products(arguments[:2], None, arguments[-2:])}


def _liger(beta, temperature, *inputs):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature)

    @torch.enable_grad()
    def call(states, weight, *teacher):
        for leaf in (states, weight):
            leaf.requires_grad_().grad = None
        loss(states, weight, *teacher).backward()

    return functools.partial(call, *inputs)


_RIVALS = {
    "gram": _gram,
    "int4_linear": _int4_linear,
    "int8_linear": _int8_linear,
    "linear_kl": _linear_kl,
    "linear_kl_topk": _linear_kl_topk,
    "structured_slice": _structured_slice,
}
