"""Fused steps between the products of a network, wherever no gradient is asked for.

A network keeps its modules, their names and its files: only `forward` of some modules is replaced,
by one that runs our ops in place of a chain of small ones, and that hands over to the module's own
for whatever it does not cover: gradients, tracing, masks, other devices. Which modules these are,
and what they compute, is read from the family's description.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine import decode
from tailor_engine.families._family import PARTS, Family
from tailor_engine.modules import FusedLinears, QuantizedLinear
from tailor_engine.ops import Op, causal_attention, gated_activation, rms_norm, rotary
from tailor_engine.ops._memory import use_large_pages

#: transformers' names of what gated_activation computes.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
#: Parts of a block that read one input.
SHARED = (("query", "key", "value"), ("gate", "up"))
NORMS = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
HEAD_NORMS = ("query_norm", "key_norm")


def fuse(network: Any, family: Family) -> None:
    """Replace what lies between the products of a network; call it once, when it is complete.

    Measured on SmolLM2 with int4 weights, see benchmarks/decode.md. A module whose own forward
    answers otherwise on a few random tokens, such as attention without rotation, stays as it is.
    """
    config, final = network.config, network.get_submodule(family.final_norm)
    epsilon = getattr(config, "rms_norm_eps", None)
    activation = ACTIVATIONS.get(getattr(config, family.activation, ""))
    if not final.weight.is_cpu:
        return  # elsewhere none of it would run
    for block in family.blocks_of(network):
        for names in SHARED:
            linears = [family.part(block, name) for name in names if family.has(block, name)]
            if len(linears) > 1 and all(isinstance(each, QuantizedLinear) for each in linears):
                FusedLinears.of(linears)
        parts = _Parts(family, block)
        x = _tokens(3, final.weight.numel(), dtype=parts.dtype())
        if epsilon is not None:
            for name in (*NORMS, *HEAD_NORMS):
                if getattr(family, name) and family.has(block, name):
                    _fuse_norm(parts[name], epsilon, family)
        if activation and family.has(block, "mlp"):
            _replace(family.part(block, "mlp"), _feed_forward, (parts, activation), x)
        if not family.has(block, "attention"):
            continue
        attention = family.part(block, "attention")
        one_dtype = x.dtype == parts["attention_norm"].weight.dtype
        if one_dtype and _is_plain(attention, config, family):
            angles = _tokens(3, attention.head_dim, dtype=x.dtype)
            inputs = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
            _replace(attention, _attention, (parts,), x, **inputs)
    if epsilon is not None:
        _fuse_norm(final, epsilon, family)
    decode.attach(network)  # moves the weights
    packed = [m.packed for m in network.modules() if hasattr(m, "packed")]
    use_large_pages(tensor for each in packed for tensor in each.held())


def _tokens(count: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, count, width, generator=generator).to(dtype)


@torch.no_grad()
def _replace(module: Any, forward: Any, arguments: tuple, x: Tensor, **options: Any) -> None:
    """Replace a module's forward by one that answers alike."""
    fused = functools.partial(forward, module, *arguments)
    expected, found = module.forward(x, **options), fused(x, **options)
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    # Quantized activations at a boundary round either way: 1 %. Another formula is off by half.
    if float((found - expected).norm()) < 0.1 * float(expected.norm()):
        module.forward = fused


class _Parts:
    """The parts of a block by name: where they are is looked up once, which they are at each call.

    An adapter may take a part's place. Looking up a path costs as much as a norm of one token.
    """

    def __init__(self, family: Family, block: nn.Module) -> None:
        self.places = {}
        for part in (*PARTS, *NORMS, *HEAD_NORMS):
            if path := getattr(family, part):
                parent, _, name = path.rpartition(".")
                self.places[part] = block.get_submodule(parent)._modules, name

    def __getitem__(self, part: str) -> Any:
        modules, name = self.places[part]
        return modules[name]

    def get(self, part: str) -> Any:
        """Return a part, or None where the family has no such."""
        place = self.places.get(part)
        return None if place is None else place[0][place[1]]

    def dtype(self) -> torch.dtype:
        """Return the dtype of what the matrices read."""
        for half, norm in (("gate", "mlp_norm"), ("query", "attention_norm")):
            modules, name = self.places[half]
            if name in modules:  # else this half is left out
                weight = getattr(modules[name], "weight", self[norm].weight)
                return weight.dtype
        return torch.float32

    def together(self, names: tuple[str, ...], x: Tensor) -> Sequence[Tensor]:
        """Return what several linears make of one input: in one product where they are fused."""
        linears = [self[name] for name in names]
        fused = getattr(linears[0], "fused", None)
        watched = any(each._forward_hooks or each._forward_pre_hooks for each in linears)
        outputs = None if fused is None or watched or fused.linears != linears else fused.all(x)
        return outputs or [linear(x) for linear in linears]

    def __contains__(self, part: str) -> bool:
        return part in self.places


def _covers(x: Tensor) -> bool:
    """Say whether the fused way is open: without gradients, on the CPU, outside of a trace."""
    return not torch.is_grad_enabled() and x.is_cpu and not torch.compiler.is_compiling()


def _run(op: Op, *arguments: Any) -> Any:
    """Run an op without torch's dispatcher and the checks, which cost more than a token's work."""
    return op.implementation(op.choose("cpu"))(*arguments)


def _fuse_norm(norm: Any, epsilon: float, family: Family) -> None:
    x = _tokens(3, len(norm.weight), norm.weight.dtype)
    _replace(norm, _norm, (float(epsilon), family.norm_offset), x)


def _norm(module: Any, epsilon: float, offset: float, x: Tensor) -> Tensor:
    weight = module._parameters["weight"]
    if not _covers(x) or x.dtype != weight.dtype:
        return type(module).forward(module, x)
    return _run(rms_norm, x, weight, epsilon, offset)


def _feed_forward(module: Any, parts: _Parts, activation: str, x: Tensor) -> Tensor:
    if not _covers(x):
        return type(module).forward(module, x)
    gate, up = parts.together(("gate", "up"), x)
    return parts["down"](_run(gated_activation, gate, up, activation))


def _is_plain(attention: Any, config: Any, family: Family) -> bool:
    """Say whether a block's attention may be what _attention computes where there is no mask."""
    capped = family.attention_softcap_key and getattr(config, family.attention_softcap_key, None)
    known = all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx"))
    causal = getattr(attention, "is_causal", False)
    return bool(known and causal and not capped)


def _attention(
    module: Any,
    parts: _Parts,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as the module does; without a mask every query sees all keys up to its place."""
    elsewhere = (
        attention_mask is not None
        or position_embeddings is None
        or options.get("output_attentions")
        or module.config._attn_implementation != "sdpa"  # others mean more by no mask
        or torch.is_autocast_enabled("cpu")  # heads and angles are of two dtypes then
        or position_embeddings[0].shape[-1] != module.head_dim
    )
    if elsewhere or not _covers(hidden_states):
        return type(module).forward(
            module,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **options,
        )
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    projected = parts.together(("query", "key", "value"), hidden_states)
    query, key, value = (x.view(shape) for x in projected)
    if "query_norm" in parts and "key_norm" in parts:
        query, key = parts["query_norm"](query), parts["key_norm"](key)
    cosine, sine = position_embeddings
    query = _run(rotary, query.transpose(1, 2), cosine, sine)
    key, value = _run(rotary, key.transpose(1, 2), cosine, sine), value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    mixed = _run(causal_attention, query, key, value, module.scaling)
    return parts["output"](mixed.view(*hidden_states.shape[:-1], -1)), None
