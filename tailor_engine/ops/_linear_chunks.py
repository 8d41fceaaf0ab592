"""Losses behind a linear head on the CPU: tokens in chunks, so that memory stays flat in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tailor_engine.ops import _linear_loss as shared

# For the logits of one chunk, student's and teacher's together: 106 rows at a vocabulary of 49,152.
# Half of it makes the products slower, twice of it nothing faster.
LOGIT_BYTES = 40 << 20
BLOCK_BYTES = 8 << 20  # for a block of the head's gradient before it is added to the total

Head = tuple[Tensor, Tensor]
Kernel = Callable[[Tensor, "Tensor | None", slice, Tensor], None]
"""kernel(student logits, teacher logits, rows among the counted ones, losses of those rows)."""


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


def run(
    kernel: Kernel,
    student: Head,
    teacher: Head | None,
    rows: Tensor | None,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, d hidden, d weight): torch's products, and between them the kernel."""
    hidden, weight = student
    # float16 has too small a range for logits: its products run in float32.
    dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
    heads = [(h, w.to(dtype)) for h, w in ([student] if teacher is None else [student, teacher])]
    total = hidden.shape[0] if rows is None else rows.numel()
    size = max(16, LOGIT_BYTES // (len(heads) * weight.shape[0] * dtype.itemsize))
    losses = torch.zeros(total, dtype=torch.float64)
    d_hidden = torch.zeros_like(hidden) if hidden_gradient else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape) if weight_gradient else torch.empty(0)
    for begin in range(0, total, size):
        part = slice(begin, min(begin + size, total))
        picked: slice | Tensor = part if rows is None else rows[part]
        inputs = [states[picked].to(dtype) for states, _ in heads]
        logits = [x @ head.T for x, (_, head) in zip(inputs, heads, strict=True)]
        kernel(logits[0], logits[1] if teacher else None, part, losses[part])
        if hidden_gradient:
            d_hidden[picked] = (logits[0] @ heads[0][1]).to(hidden.dtype)
        if weight_gradient:
            _add_product(d_weight, logits[0], inputs[0])
        del logits  # before the next chunk's are allocated
    return losses.sum().float(), d_hidden, d_weight


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add ``gradient^T hidden`` to a float32 total."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.T, hidden)
        return
    # torch has no bfloat16 product that adds to float32 here: blocks that stay in the cache.
    step = max(64, BLOCK_BYTES // (4 * max(total.shape[1], 1)))
    for begin in range(0, total.shape[0], step):
        block = slice(begin, begin + step)
        total[block] += gradient[:, block].T @ hidden
