"""Losses behind a linear head on the CPU: tokens in chunks, so that memory does not grow with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tailor_engine.ops import _linear_loss as shared

LOGIT_BYTES = 40 << 20  # for the logits of one chunk, student's and teacher's together
GRADIENT_BYTES = 8 << 20  # for one block of a bfloat16 head's gradient before it is added

Head = tuple[Tensor, Tensor]
Kernel = Callable[[Tensor, "Tensor | None", slice, Tensor], None]
"""kernel(student logits, teacher logits, rows among the counted ones, losses of those rows)."""


def counted_rows(
    labels: Tensor | None, mask: Tensor | None, with_divergence: bool
) -> tuple[Tensor | None, int | None]:
    """Return the indices of the rows that count (None: all) and how many of them have a label."""
    counted = mask
    if labels is not None and (mask is None or not with_divergence):
        labelled = labels != shared.IGNORED
        counted = labelled if mask is None else labelled & mask
    rows = None if counted is None or bool(counted.all()) else counted.nonzero()[:, 0]
    if labels is None:
        return rows, None
    picked = labels if rows is None else labels[rows]
    return rows, int((picked != shared.IGNORED).sum())


def products_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the products; float16 has too small a range for logits."""
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32


def run(
    kernel: Kernel,
    student: Head,
    teacher: Head | None,
    rows: Tensor | None,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, d hidden, d weight): products by torch, everything between them by the kernel."""
    hidden, weight = student
    dtype = products_dtype(hidden)
    heads = [(h, w.to(dtype)) for h, w in ([student] if teacher is None else [student, teacher])]
    total, vocabulary = hidden.shape[0] if rows is None else rows.numel(), weight.shape[0]
    size = max(16, LOGIT_BYTES // (len(heads) * vocabulary * dtype.itemsize))
    size = min(size, max(total, 1))
    buffers = [torch.empty(size, vocabulary, dtype=dtype) for _ in heads]
    losses = torch.zeros(total, dtype=torch.float64)
    d_hidden = torch.zeros_like(hidden) if hidden_gradient else hidden.new_empty(0)
    d_weight = torch.empty(weight.shape) if weight_gradient else torch.empty(0)
    for begin in range(0, total, size):
        part = slice(begin, min(begin + size, total))
        logits, inputs = [], []
        for (states, head), buffer in zip(heads, buffers, strict=True):
            picked = states[part] if rows is None else states[rows[part]]
            inputs.append(picked.to(dtype))
            logits.append(torch.mm(inputs[-1], head.T, out=buffer[: part.stop - begin]))
        kernel(logits[0], logits[1] if teacher else None, part, losses[part])
        gradient = logits[0]
        if hidden_gradient:
            d_rows = (gradient @ heads[0][1]).to(hidden.dtype)
            if rows is None:
                d_hidden[part] = d_rows
            else:
                d_hidden[rows[part]] = d_rows
        if weight_gradient:
            _add_product(d_weight, gradient, inputs[0], first=begin == 0)
    if weight_gradient and total == 0:
        d_weight.zero_()
    return losses.sum().float(), d_hidden, d_weight


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """Add ``gradient^T hidden`` to a float32 total; the first product overwrites it."""
    if gradient.dtype == torch.float32:
        if first:
            torch.mm(gradient.T, hidden, out=total)
        else:
            total.addmm_(gradient.T, hidden)
        return
    # torch has no bfloat16 product with a float32 result here: blocks that stay in the cache.
    step = max(64, GRADIENT_BYTES // (2 * total.shape[1]))
    for begin in range(0, total.shape[0], step):
        block = slice(begin, begin + step)
        product = gradient[:, block].T @ hidden
        if first:
            total[block] = product
        else:
            total[block] += product
