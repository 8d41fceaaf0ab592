"""Attention of a prompt or of its next token, heads sharing keys and values in groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._op import op, threads

WIDEST = 256  # values of a head in C++ (csrc/cpu/causal_attention.h); plain torch beyond


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return ``softmax(scale * query @ key.T) @ value``; a query sees the keys up to its place.

    Shapes: query [B, H, T, D], key and value [B, G, S, D] with H a multiple of G and S >= T, any
        strides -> [B, T, H, D]. The T queries are of the last T places of S.
    Numbers: all of one dtype, which the result has; in between float32 (float64 for float64).
        Without gradients: it stands in for a network's own where none is asked for.
        No Triton kernel: on a GPU torch's own fused attention is what a network runs.
    Raises: ValueError, TypeError for other shapes and dtypes.
    """
    wide = rules.compute_dtype(query)
    repeats, (tokens, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = (x.to(wide).repeat_interleave(repeats, 1) for x in (key, value))
    scores = (query.to(wide) * scale) @ key.transpose(2, 3)
    place = torch.arange(keys, device=query.device)
    hidden = place > place[keys - tokens :, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    check.dimensions("causal_attention", "query", query, 4)
    check.dimensions("causal_attention", "key", key, 4)
    check.dtype("causal_attention", "query", query, check.FLOATS)
    batch, heads, tokens, width = query.shape
    groups, keys = key.shape[1:3]
    check.shape("causal_attention", "key", key, (batch, groups, keys, width))
    check.shape("causal_attention", "value", value, (batch, groups, keys, width))
    check.dtype("causal_attention", "key", key, (query.dtype,))
    check.dtype("causal_attention", "value", value, (query.dtype,))
    if not groups or heads % groups:
        raise ValueError(f"causal_attention: {heads} heads cannot share {groups} groups of keys")
    if keys < tokens:
        raise ValueError(f"causal_attention: {tokens} queries need as many keys, got {keys}")


def _cpu(native: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, width = query.shape
    if query.dtype == torch.float64 or not query.numel() or width > WIDEST:
        return reference(query, key, value, scale)
    query, key, value = (check.rows_contiguous(x) for x in (query, key, value))
    y = query.new_empty((batch, tokens, heads, width))
    native.causal_attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), check.CODES[query.dtype], batch, heads,
        key.shape[1], tokens, key.shape[2], width, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], scale, y.data_ptr(), threads(),
    )  # fmt: skip
    return y


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def heads(batch: int, count: int, groups: int, tokens: int, keys: int, width: int) -> tuple:
        shapes = (count, tokens), (groups, keys), (groups, keys)
        return tuple(torch.randn(batch, n, t, width, generator=generator) for n, t in shapes)

    for shape in (
        (1, 1, 1, 1, 1, 1), (2, 6, 2, 1, 70, 33), (1, 20, 2, 1, 64, 64), (1, 9, 3, 130, 130, 64),
        (2, 4, 4, 5, 75, 40), (1, 3, 1, 67, 200, 100), (1, 2, 1, 0, 3, 8), (1, 2, 1, 9, 9, 256),
    ):  # fmt: skip
        yield *heads(*shape), shape[-1] ** -0.5
    for dtype in (torch.bfloat16, torch.float16):
        for tokens in (1, 33):
            yield *(x.to(dtype) for x in heads(1, 4, 2, tokens, 97, 64)), 0.125
    query, key, value = heads(2, 50, 3, 6, 60, 6)  # [B, T, H, D], as a projection leaves its heads
    yield query.transpose(1, 2), key[:, :, 5:], value[:, :, 5:], 0.5
    yield *(30 * x for x in heads(1, 2, 1, 70, 70, 32)), 1.0
    yield *heads(1, 300, 1, 3, 4, 250), 0.1


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    query, key = torch.zeros(2, 6, 3, 8), torch.zeros(2, 2, 5, 8)
    yield (query[0], key, key, 1.0), ValueError, "query must have 4 dimensions"
    yield (query, key[0], key, 1.0), ValueError, "key must have 4 dimensions"
    yield (query.int(), key, key, 1.0), TypeError, "query must be float32"
    yield (query, key[..., :7], key, 1.0), ValueError, "key must have shape [2, 2, 5, 8]"
    yield (query, key, key[:, :, :4], 1.0), ValueError, "value must have shape [2, 2, 5, 8]"
    yield (query, key, key.half(), 1.0), TypeError, "value must be float32, got float16"
    yield (query[:, :5], key, key, 1.0), ValueError, "5 heads cannot share 2 groups"
    yield (query, key[:, :, :2], key[:, :, :2], 1.0), ValueError, "3 queries need as many keys"


def _cost(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[float, float]:
    """One read of all, one write; two products over the pairs that see each other."""
    batch, heads, tokens, width = query.shape
    pairs = tokens * key.shape[2] - tokens * (tokens - 1) // 2
    moved = (2 * query.numel() + 2 * key.numel()) * query.element_size()
    return moved, 4.0 * batch * heads * pairs * width


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for tokens, keys in ((1, 128), (1, 1024), (512, 512)):
        query = torch.randn(1, tokens, 9, 64).transpose(1, 2)
        key, value = torch.randn(2, 1, 3, keys, 64)
        yield f"9/3x{tokens}x{keys}x64", (query, key, value, 0.125)


causal_attention = op(__name__, "(Tensor query, Tensor key, Tensor value, float scale) -> Tensor")
