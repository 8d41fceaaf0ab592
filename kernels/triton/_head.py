"""The loop behind a linear head: logits and gradients of a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass

import torch
from torch import Tensor

from tailor_engine.kernels._device import power_of_two

IGNORED = -100
BUFFER_BYTES = 1280 << 20  # of the logits of one chunk, student and teacher together
LONGEST, SHORTEST = 4096, 256  # tokens of a chunk


def config(tokens: int, vocabulary: int, element_size: int) -> dict[str, int]:
    """Choose the tokens of a chunk, and the block that walks along a row of logits.

    A longer chunk reads the weights less often (they cost as much as 266 tokens' products on an
    H100, the float32 gradient of the head 1064); a shorter one needs less memory.
    """
    fitting = BUFFER_BYTES // (2 * vocabulary * element_size)
    longest = min(LONGEST, max(SHORTEST, 1 << max(fitting, 1).bit_length() - 1))
    block = power_of_two(vocabulary, 128, 2048)
    return {"tokens": min(tokens, longest), "block_v": block, "warps": max(1, block // 512)}


@dataclass(frozen=True)
class Rows:
    """What each row weighs: its factor in the divergence and in the cross-entropy, [T] each."""

    counted: Tensor | None
    divergence: Tensor
    entropy: Tensor

    def hidden(self, states: Tensor, begin: int, end: int) -> Tensor:
        """Return a chunk of hidden states, zero where a row does not count: NaN must not spread."""
        part = states[begin:end]
        if self.counted is None:
            return part
        return torch.where(self.counted[begin:end, None], part, 0)


def rows_of(hidden: Tensor, labels: Tensor | None, mask: Tensor | None, mix: float) -> Rows:
    """Return the rows' factors; the counting stays on the device."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    every = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    labelled = every if labels is None else labels != IGNORED
    counted = labelled if mask is None else mask
    labelled = labelled & counted
    divergence = counted.to(wide) * (1 - mix) / counted.sum().clamp(min=1)
    entropy = labelled.to(wide) * mix / labelled.sum().clamp(min=1)
    chosen = counted if mix < 1 else labelled
    return Rows(None if labels is None and mask is None else chosen, divergence, entropy)


def accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add left.T @ right to a float32 (float64) total; the first chunk overwrites it."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right, beta=0 if first else 1)
    elif left.device.type == "cuda":  # 16-bit operands, float32 sums, no copy of either
        if first:
            torch.mm(left.t(), right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype), beta=0 if first else 1)


def chunks(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    size: int,
    gradients: tuple[bool, bool],
    row_pass: Callable[[Tensor, int, int], None],
) -> tuple[Tensor, Tensor]:
    """Return (d hidden, d weight); `row_pass(logits, begin, end)` turns logits into gradients."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    to_hidden, to_weight = gradients
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    d_hidden = torch.empty_like(hidden) if to_hidden else hidden.new_empty(0)
    shape = tuple(weight.shape) if to_weight else (0,)
    make = torch.empty if tokens else torch.zeros
    d_weight = make(shape, dtype=wide, device=hidden.device)
    buffer = hidden.new_empty(size, vocabulary)
    for begin in range(0, tokens, max(size, 1)):
        end = min(begin + size, tokens)
        part = rows.hidden(hidden, begin, end)
        logits = torch.mm(part, weight.t(), out=buffer[: end - begin])
        row_pass(logits, begin, end)
        if to_hidden:
            torch.mm(logits, weight, out=d_hidden[begin:end])
        if to_weight:
            accumulate(d_weight, logits, part, begin == 0)
    return d_hidden, d_weight


def pointer_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor to pass where a kernel does not read the argument."""
    return other if tensor is None else tensor.contiguous()


def factors(temperature: float) -> tuple[float, float, float, float]:
    """Return 1 / temperature as a sum of two float32, and what scales gradient and divergence.

    Each is rounded to float32 once: one rounded reciprocal would shift every logit the same way.
    """
    high = c_float(1 / temperature).value
    return high, 1 / temperature - high, temperature, temperature * temperature
