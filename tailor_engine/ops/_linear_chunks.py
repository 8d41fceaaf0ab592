"""Losses behind a linear head on the CPU: tokens in chunks, so that memory stays flat in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _bfloat16
from tailor_engine.ops import _check as check
from tailor_engine.ops import _linear_loss as shared
from tailor_engine.ops._op import threads

# For the logits of one chunk, student's and teacher's together, and what goes along with them:
# 144 rows at a vocabulary of 49,152. The head and its gradient pass through memory once a chunk.
CHUNK_BYTES = 56 << 20
BLOCK_BYTES = 8 << 20  # of the head at a time, where it or its gradient is converted

# csrc/cpu: tokens of the widest vector and panel, ids of a block, doubles of Sums and Slope.
_VECTOR, _PANEL, _BLOCK, _SUMS, _SLOPE = 16, 48, 96, 8, 9

Head = tuple[Tensor, Tensor]  # hidden states [T, D] and weight [V, D]


@dataclass
class Chunk:
    """Some of the tokens that count: what a kernel gets."""

    part: slice
    """Which of the counted rows."""
    logits: list[Tensor]
    """[V, stride] of the student and, where there is one, the teacher."""
    sums: Tensor
    """Workspace of the kernel."""
    student: tuple[int, ...] = (0, 0, 0, 0)
    """Addresses of states and weight, dtype and width, where the kernel makes the products."""
    teacher: tuple[int, ...] = (0, 0, 0, 0)
    results: tuple[int | bool, ...] = (0, 0, 0, True)
    """Addresses of workspace, d weight and d hidden; whether d weight is written, not added to."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, stride and vocabulary."""
        vocabulary, stride = self.logits[0].shape
        return self.part.stop - self.part.start, stride, vocabulary


Kernel = Callable[[Chunk, Tensor], None]
"""kernel(chunk, losses of its rows)."""


def counted_rows(
    labels: Tensor | None, mask: Tensor | None, with_divergence: bool
) -> tuple[Tensor | None, int]:
    """Return the indices of the rows that count (None: all) and how many of them have a label."""
    counted = mask
    if labels is not None and (mask is None or not with_divergence):
        labelled = labels != shared.IGNORED
        counted = labelled if mask is None else labelled & mask
    rows = None if counted is None or bool(counted.all()) else counted.nonzero()[:, 0]
    if labels is None:
        return rows, 0
    picked = labels if rows is None else labels[rows]
    return rows, int((picked != shared.IGNORED).sum())


def own_products(native: Any, dtype: torch.dtype) -> bool:
    """Say whether the kernel's own float32 products are faster here than torch's in this dtype.

    Loss and gradients of 512 x 576 x 49,152 on Zen 5, one thread: with our products 0.72 s at
    AVX-512 and 1.24 s at AVX2, MKL's four products alone 1.45 s; two threads at AVX-512: 0.46 and
    1.05 s. torch's bfloat16 products run at 3 to 4 times MKL's rate where the processor has
    instructions for them, else 5 to 90 times slower. The portable level has no FMA.
    """
    if native.__name__.endswith("baseline"):
        return False
    return dtype != torch.bfloat16 or _bfloat16.speedup("cpu", threads()) < 2


def run(
    kernel: Kernel,
    native: Any,
    student: Head,
    teacher: Head | None,
    rows: Tensor | None,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, d hidden, d weight)."""
    hidden, weight = student
    total = hidden.shape[0] if rows is None else rows.numel()
    losses = torch.zeros(total, dtype=torch.float64)
    d_hidden = torch.zeros_like(hidden) if hidden_gradient else hidden.new_empty(0)
    d_weight = torch.empty(0)
    if weight_gradient:  # the first chunk writes it, so zeros would only be overwritten
        d_weight = torch.empty(weight.shape) if total else torch.zeros(weight.shape)
    heads = [(h, w.contiguous()) for h, w in ([student] if teacher is None else [student, teacher])]
    products = OwnProducts if own_products(native, hidden.dtype) else TorchProducts
    work = products(heads, total, hidden_gradient, d_weight)
    for begin in range(0, total, work.size):
        part = slice(begin, min(begin + work.size, total))
        picked: slice | Tensor = part if rows is None else rows[part]
        states = [h[picked].to(work.dtype).contiguous() for h, _ in heads]
        chunk = work.start(part, states)
        kernel(chunk, losses[part])
        gradient = work.finish(chunk, states)
        if hidden_gradient:
            d_hidden[picked] = gradient.to(hidden.dtype)
    return losses.sum().float(), d_hidden, d_weight


class OwnProducts:
    """The kernel makes the products, in a sweep for the logits and one for the gradients."""

    dtype = torch.float32

    def __init__(
        self, heads: list[Head], total: int, hidden_gradient: bool, d_weight: Tensor
    ) -> None:
        self.heads, self.d_weight = heads, d_weight
        vocabulary, width = heads[0][1].shape
        # An odd number of cache lines a row, so that the rows do not share a few places of the
        # cache, and whole panels.
        bytes_of_vector = 4 * _VECTOR * (len(heads) * vocabulary + threads() * width)
        vectors = CHUNK_BYTES // bytes_of_vector
        self.size = _VECTOR * (vectors - (vectors - 3) % 6 if vectors >= 3 else 1)
        self.stride = _VECTOR * (-(-min(self.size, total) // _VECTOR) | 1)
        self.logits = [torch.empty(vocabulary, self.stride) for _ in heads]
        self.sums = _workspace(self.stride)
        self.d_hidden = torch.empty(threads() if hidden_gradient else 0, width, self.stride)
        widths = [weight.shape[1] for _, weight in heads]
        packed = (self.stride + _PANEL) * (sum(widths) + widths[0] + _PANEL)
        self.workspace = torch.empty(packed + threads() * _BLOCK * max(widths))

    def start(self, part: slice, states: list[Tensor]) -> Chunk:
        """Return the chunk; its logits are not there yet."""
        heads = [
            (x.data_ptr(), weight.data_ptr(), check.CODES[weight.dtype], weight.shape[1])
            for x, (_, weight) in zip(states, self.heads, strict=True)
        ]
        results = (self.workspace.data_ptr(), *_pointers(self.d_weight, self.d_hidden))
        chunk = Chunk(part, self.logits, self.sums, heads[0], results=(*results, part.start == 0))
        if len(heads) > 1:
            chunk.teacher = heads[1]
        return chunk

    def finish(self, chunk: Chunk, _: list[Tensor]) -> Tensor:
        """Return d hidden of the chunk."""
        return self.d_hidden.sum(0)[:, : chunk.shape[0]].T


class TorchProducts:
    """torch makes the products, before and after the kernel."""

    def __init__(self, heads: list[Head], _: int, hidden_gradient: bool, d_weight: Tensor) -> None:
        self.heads, self.d_weight, self.hidden_gradient = heads, d_weight, hidden_gradient
        # float16 has too small a range for logits: its products run in float32.
        bfloat16 = heads[0][0].dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        vocabulary, width = heads[0][1].shape
        room = CHUNK_BYTES - 3 * BLOCK_BYTES
        bytes_of_vector = self.dtype.itemsize * _VECTOR * len(heads) * vocabulary
        self.size = _VECTOR * max(1, room // bytes_of_vector)
        self.step = max(64, BLOCK_BYTES // (4 * max(width, 1)))

    def start(self, part: slice, states: list[Tensor]) -> Chunk:
        """Return the chunk with its logits; the last lanes of a vector are zero."""
        tokens = part.stop - part.start
        stride = _VECTOR * -(-tokens // _VECTOR)
        logits = []
        for x, (_, weight) in zip(states, self.heads, strict=True):
            padded = torch.nn.functional.pad(x, (0, 0, 0, stride - tokens))
            logits.append(torch.empty(weight.shape[0], stride, dtype=self.dtype))
            for block, rows in self._blocks(weight):
                torch.mm(rows, padded.T, out=logits[-1][block])
        return Chunk(part, logits, _workspace(stride))

    def finish(self, chunk: Chunk, states: list[Tensor]) -> Tensor:
        """Add to d weight and return d hidden of the chunk."""
        gradient = chunk.logits[0][:, : chunk.shape[0]]
        d_hidden = torch.zeros(states[0].shape if self.hidden_gradient else 0)
        for block, rows in self._blocks(self.heads[0][1]):
            if self.hidden_gradient:
                d_hidden += gradient[block].T @ rows
        if self.d_weight.numel():
            # torch has no bfloat16 product that adds to float32 here: blocks that stay in the cache
            for begin in range(0, len(self.d_weight), self.step):
                block = slice(begin, begin + self.step)
                product = gradient[block] @ states[0]
                if chunk.part.start == 0:
                    self.d_weight[block] = product
                else:
                    self.d_weight[block] += product
        return d_hidden

    def _blocks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Return the weight whole, or where it has another dtype in converted blocks."""
        step = len(weight) if weight.dtype == self.dtype else self.step
        for begin in range(0, len(weight), step):
            block = slice(begin, begin + step)
            yield block, weight[block].to(self.dtype)


def _workspace(stride: int) -> Tensor:
    return torch.empty((threads() * _SUMS + _SLOPE) * stride, dtype=torch.float64)


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]
