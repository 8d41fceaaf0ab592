"""The loop behind a linear head: logits and gradients of a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tailor_engine.kernels._device import power_of_two

IGNORED = -100
BUFFER_BYTES = 2 << 30  # of the logits of one chunk, student and teacher together
LONGEST, SHORTEST = 4096, 256  # tokens of a chunk
NEAR_BYTES = 96 << 10  # of the rows of one program, so that two of them share a processor's L1
LOAD_BYTES = 16  # that a thread loads at once

# torch 2.10 was the first to add a 16-bit product to a float32 matrix.
ADDS_TO_FLOAT32 = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"


def config(
    tokens: int, vocabulary: int, element_size: int, rows: int = 2, most_warps: int = 32
) -> dict[str, int]:
    """Choose the tokens of a chunk, and how a program walks along its row (or two, a teacher's).

    | what | why |
    |---|---|
    | tokens: as 2 GiB hold, at most 4096 | the weights' reads cost as much as 266 tokens' products
      on an H100 and the read and write of d weight as 1064: 2k-4k hide both up to 260k ids |
    | tokens: equal chunks of whole 256 | a short last chunk would leave tensor cores idle |
    | lanes: 16 bytes a load | the widest that a thread can ask for |
    | warps: all 32 where rows are long | a row is read again as soon as its end is reached. One
      program a processor keeps 132 rows (25 MB at 49k ids) in flight, which fit into the L2 cache
      and nearly into L1 (256 KB); six small programs a processor would need 150 MB |
    | warps: 16 up to 96 KB | two programs then share L1, one reads while the other writes |
    | stride: whole 16 elements | every row starts where 16-byte loads may, at any vocabulary |
    """
    fitting = BUFFER_BYTES // (2 * vocabulary * element_size)
    longest = min(LONGEST, max(SHORTEST, 1 << max(fitting, 1).bit_length() - 1))
    even = triton.cdiv(tokens, triton.cdiv(tokens, longest)) if tokens else 0
    lanes = LOAD_BYTES // element_size
    near = rows * vocabulary * element_size <= NEAR_BYTES
    warps = power_of_two(
        triton.cdiv(vocabulary, 32 * lanes), 1, min(most_warps, 16 if near else 32)
    )
    return {
        "tokens": min(tokens, triton.cdiv(even, SHORTEST) * SHORTEST),
        "stride": triton.cdiv(vocabulary, 16) * 16,
        "lanes": lanes,
        "lines": 32 * warps,
        "warps": warps,
    }


def candidates(
    tokens: int, vocabulary: int, element_size: int, rows: int = 2, most_warps: int = 32
) -> list[dict[str, int]]:
    """Return the choices that a measurement decides between, the usual one first."""
    usual = config(tokens, vocabulary, element_size, rows, most_warps)
    found = [usual]
    for warps in (8, 16, 32):
        for loads in (1, 2):  # that a thread has under way, for each of the rows
            other = {**usual, "warps": warps, "lines": 32 * warps * loads}
            if other not in found and other["lines"] * other["lanes"] <= usual["stride"]:
                found.append(other)
    for size in (1024, 2048):
        if size < usual["tokens"]:
            found.append({**usual, "tokens": size})
    return found


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
    """Add left.T @ right to a float32 (float64) total; the first chunk overwrites it.

    16-bit operands on a GPU: products and sums in float32, no copy of either.
    """
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right, beta=0 if first else 1)
    elif left.device.type != "cuda":
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype), beta=0 if first else 1)
    elif first:
        torch.mm(left.t(), right, out_dtype=total.dtype, out=total)
    elif ADDS_TO_FLOAT32:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left.t(), right, out_dtype=total.dtype)


def chunks(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    chosen: dict[str, int],
    gradients: tuple[bool, bool],
    row_pass: Callable[[Tensor, int, int], None],
) -> tuple[Tensor, Tensor]:
    """Return (d hidden, d weight); `row_pass(logits, begin, end)` turns logits into gradients."""
    tokens, size = hidden.shape[0], chosen["tokens"]
    to_hidden, to_weight = gradients
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    d_hidden = torch.empty_like(hidden) if to_hidden else hidden.new_empty(0)
    shape = tuple(weight.shape) if to_weight else (0,)
    make = torch.empty if tokens else torch.zeros
    d_weight = make(shape, dtype=wide, device=hidden.device)
    buffer = logits_buffer(weight, chosen)
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


def logits_buffer(weight: Tensor, chosen: dict[str, int]) -> Tensor:
    """Return the logits [tokens, V] of a chunk, not written yet; their rows are padded."""
    return weight.new_empty(chosen["tokens"], chosen["stride"])[:, : weight.shape[0]]


def pointer_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor to pass where a kernel does not read the argument."""
    return other if tensor is None else tensor.contiguous()


def factors(temperature: float) -> tuple[float, float, float, float]:
    """Return log2(e) / temperature as two float32, and what scales gradient and divergence.

    The kernels count in bits: a divergence is scaled by ln 2 as well.
    """
    bits = math.log2(math.e) / temperature
    high = c_float(bits).value
    return high, bits - high, temperature, temperature * temperature
