"""Distillation loss against a cached teacher: top-k ids, their log-probabilities, and the tail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _linear_chunks as chunks
from tailor_engine.ops import _linear_loss as shared
from tailor_engine.ops._op import op, threads


def linear_kl_topk(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Return KL(teacher | student) where the teacher is known by its k likeliest tokens a row.

    The ids that are not listed form one bucket: the teacher's remaining mass against the student's.
    Mixing with cross-entropy, mask and labels as in :func:`linear_kl`; gradients reach
    student_hidden and student_weight.

    Shapes: student_hidden [T, D], student_weight [V, D], teacher_ids and teacher_log_probs [T, k]
        with 1 <= k <= V, labels [T] or None, mask [T] or None; the result is a scalar.
    Numbers: as in :func:`linear_kl`; teacher_ids int64, distinct within a row; teacher_log_probs
        floating, the teacher's log-softmax over the whole vocabulary at this same temperature.
    Raises: ValueError, TypeError for shapes, dtypes and numbers that do not fit.
    """
    hidden = shared.in_autocast(student_hidden)
    grad = torch.is_grad_enabled()
    with shared.without_autocast(student_hidden):
        outputs = torch.ops.tailor_engine.linear_kl_topk(
            hidden, student_weight, teacher_ids, teacher_log_probs, labels, mask,
            float(temperature), float(cross_entropy), float(softcap),
            grad and student_hidden.requires_grad, grad and student_weight.requires_grad,
        )  # fmt: skip
    return shared.sole_loss(outputs)


def reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    cross_entropy: float,
    softcap: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, d student_hidden [T, D], d student_weight [V, D]).

    A gradient that is not asked for is an empty tensor. This one holds all logits.
    """
    divergence_rows, entropy_rows = shared.row_weights(student_hidden, labels, mask)
    counted = (divergence_rows if cross_entropy < 1 else entropy_rows)[:, None] > 0
    hidden = torch.where(counted, student_hidden, 0)
    compute = shared.wide(hidden)
    logits = (hidden @ student_weight.to(hidden.dtype).T).to(compute)
    logits = shared.capped(logits, softcap)
    loss, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    if cross_entropy < 1:
        log_q = torch.where(counted, teacher_log_probs, -1.0).to(compute)
        rows, slope = _divergence(logits / temperature, teacher_ids, log_q)
        share = (1 - cross_entropy) * temperature * divergence_rows
        loss = loss + temperature * (share * rows).sum()
        gradient = gradient + share[:, None] * slope
    if cross_entropy > 0 and labels is not None:
        rows, slope = shared.cross_entropy(logits, labels)
        share = cross_entropy * entropy_rows
        loss = loss + (share * rows).sum()
        gradient = gradient + share[:, None] * slope
    if softcap:
        gradient = gradient * (1 - (logits / softcap) ** 2)
    return loss, *shared.through_head(
        gradient, hidden, student_weight, hidden_gradient, weight_gradient
    )


def _divergence(logits: Tensor, ids: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row over k ids and a tail, and its gradient for the logits."""
    log_p = torch.log_softmax(logits, -1)
    q = log_q.exp()
    # Where every id is listed there is no tail; rounding must not invent one.
    has_tail = ids.shape[1] < logits.shape[1]
    tail = (1 - q.sum(-1)).clamp(min=0) if has_tail else torch.zeros_like(q[:, 0])
    # A tail that is summed by itself: 1 - (listed probabilities) would lose all its digits.
    log_tail = torch.scatter(log_p, 1, ids, float("-inf")).logsumexp(-1) if has_tail else tail
    rows = torch.where(q > 0, q * (log_q - log_p.gather(1, ids)), 0).sum(-1)
    rows = rows + torch.special.xlogy(tail, tail) - tail * log_tail
    target = (log_p - log_tail[:, None]).exp() * tail[:, None]
    mass = q.sum(-1) + tail
    return rows, log_p.exp() * mass[:, None] - torch.scatter(target, 1, ids, q)


def _cpu(
    native: Any,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    cross_entropy: float,
    softcap: float,
    *gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if student_hidden.dtype == torch.float64:  # for truths, not for speed
        return reference(
            student_hidden, student_weight, teacher_ids, teacher_log_probs, labels, mask,
            temperature, cross_entropy, softcap, *gradients,
        )  # fmt: skip
    rows, labelled = chunks.counted_rows(labels, mask, cross_entropy < 1)
    total = student_hidden.shape[0] if rows is None else rows.numel()
    ids, log_q, picked = (
        None if t is None else (t if rows is None else t[rows]).contiguous()
        for t in (teacher_ids, teacher_log_probs, labels)
    )
    assert ids is not None and log_q is not None
    log_q = log_q.float()
    share = (1 - cross_entropy) * temperature**2 / max(total, 1)
    entropy_share = cross_entropy / max(labelled, 1)

    def kernel(chunk: chunks.Chunk, losses: Tensor) -> None:
        part = ids[chunk.part]
        ordered = part.flatten().sort()  # so that a block of the vocabulary finds its own
        scratch = torch.empty_like(log_q[chunk.part])
        native.linear_kl_topk(
            chunk.logits[0].data_ptr(), check.CODES[chunk.logits[0].dtype], *chunk.shape,
            part.data_ptr(), ordered.values.data_ptr(), ordered.indices.data_ptr(),
            log_q[chunk.part].data_ptr(), scratch.data_ptr(), ids.shape[1],
            check.pointer(None if picked is None else picked[chunk.part]), share, entropy_share,
            temperature, softcap, any(gradients), chunk.sums.data_ptr(), losses.data_ptr(),
            threads(), *chunk.student, *chunk.results,
        )  # fmt: skip

    return chunks.run(kernel, native, (student_hidden, student_weight), None, rows, *gradients)


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    cross_entropy: float,
    softcap: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> None:
    name = "linear_kl_topk"
    shared.check_head(name, student_hidden, student_weight, "student")
    tokens, vocabulary = student_hidden.shape[0], student_weight.shape[0]
    check.dimensions(name, "teacher_ids", teacher_ids, 2)
    k = teacher_ids.shape[1]
    check.shape(name, "teacher_ids", teacher_ids, (tokens, k))
    if not 1 <= k <= vocabulary:
        raise ValueError(f"{name}: teacher_ids must list from 1 to {vocabulary} ids a row, got {k}")
    check.ids(name, "teacher_ids", teacher_ids, vocabulary)
    check.shape(name, "teacher_log_probs", teacher_log_probs, (tokens, k))
    check.dtype(name, "teacher_log_probs", teacher_log_probs, check.FLOATS)
    shared.check_targets(name, tokens, vocabulary, labels, mask)
    shared.check_numbers(name, temperature, cross_entropy, labels is not None)
    shared.check_softcap(name, "softcap", softcap)


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def arguments(
        tokens: int, hidden: int, vocabulary: int, k: int, *numbers: float,
        dtype: torch.dtype = torch.float32, scale: float = 1.0, labels: bool = True,
        mask: Tensor | None = None, gradients: tuple[bool, bool] = (True, True),
    ) -> tuple:  # fmt: skip
        def normal(*shape: int) -> Tensor:
            return scale * torch.randn(*shape, generator=generator)

        teacher = torch.log_softmax(2 * normal(tokens, vocabulary), -1).topk(k)
        ids = torch.randint(vocabulary, (tokens,), generator=generator)
        ids[1::4] = shared.IGNORED
        return (
            normal(tokens, hidden).to(dtype), normal(vocabulary, hidden).to(dtype),
            teacher.indices, teacher.values, ids if labels else None, mask, *numbers, *gradients,
        )  # fmt: skip

    half = torch.arange(37) % 2 == 0
    yield arguments(3, 4, 7, 2, 1.5, 0.3, 4.0)
    yield arguments(1, 1, 1, 1, 1.0, 0.0, 0.0, labels=False)
    yield arguments(0, 4, 9, 3, 1.0, 0.5, 0.0)
    yield arguments(37, 24, 501, 16, 2.0, 0.0, 0.0, mask=half)
    yield arguments(37, 24, 501, 16, 1.0, 0.4, 0.0, mask=half, gradients=(True, False))
    yield arguments(33, 24, 1030, 64, 0.7, 0.5, 6.0)
    yield arguments(33, 24, 40, 40, 1.0, 0.0, 0.0)
    yield arguments(33, 24, 130, 5, 1.0, 0.0, 0.0, gradients=(False, False))
    yield arguments(33, 24, 130, 5, 1.0, 1.0, 0.0)
    yield arguments(33, 24, 300, 8, 1.0, 0.1, 0.0, scale=8.0)
    for dtype in (torch.bfloat16, torch.float16):
        yield arguments(33, 48, 300, 20, 1.0, 0.5, 30.0, dtype=dtype, scale=0.5)


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    hidden, weight = torch.zeros(3, 4), torch.zeros(7, 4)
    ids, log_probs = torch.tensor([[0, 6]] * 3), torch.full((3, 2), -1.0)
    labels, mask = torch.tensor([0, -100, 6]), torch.ones(3, dtype=torch.bool)
    good = [hidden, weight, ids, log_probs, labels, mask, 1.0, 0.5, 0.0, True, True]

    def changed(position: int, value: Any) -> tuple:
        return (*good[:position], value, *good[position + 1 :])

    yield changed(0, hidden[None]), ValueError, "student_hidden must have 2 dimensions"
    yield changed(1, torch.zeros(7, 5)), ValueError, "student_weight must have shape [V, 4]"
    yield changed(2, ids[:2]), ValueError, "teacher_ids must have shape [3, 2], got [2, 2]"
    yield changed(2, ids.int()), TypeError, "teacher_ids must be int64"
    yield changed(2, ids + 1), ValueError, "teacher_ids must be from 0 to 6, got 7"
    yield changed(2, ids[:, :0]), ValueError, "teacher_ids must list from 1 to 7 ids a row, got 0"
    yield changed(3, log_probs[:, :1]), ValueError, "teacher_log_probs must have shape [3, 2]"
    yield changed(4, None), ValueError, "cross_entropy=0.5 needs labels"
    yield changed(5, mask[:2]), ValueError, "mask must have shape [3]"
    yield changed(6, -1.0), ValueError, "temperature must be above 0, got -1.0"
    yield changed(8, float("nan")), ValueError, "softcap must be 0 (none) or above, got nan"


def _cost(
    student_hidden: Tensor, student_weight: Tensor, teacher_ids: Tensor, teacher_log_probs: Tensor,
    labels: Tensor | None, mask: Tensor | None, temperature: float, cross_entropy: float,
    softcap: float, hidden_gradient: bool, weight_gradient: bool,
) -> tuple[float, float]:  # fmt: skip
    """One read of the inputs and one write of the gradients; one to three products of all rows."""
    inputs = (student_hidden, student_weight, teacher_ids, teacher_log_probs)
    moved = sum(t.numel() * t.element_size() for t in inputs)
    moved += hidden_gradient * student_hidden.numel() * student_hidden.element_size()
    moved += weight_gradient * student_weight.numel() * 4
    products = 1 + hidden_gradient + weight_gradient
    return moved, 2 * products * student_hidden.numel() * student_weight.shape[0]


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    hidden, head = torch.randn(512, 576), torch.randn(49152, 576) / 24
    teacher = torch.log_softmax(torch.randn(512, 49152), -1).topk(64)
    numbers = (None, None, 1.0, 0.0, 0.0, True, True)
    yield "512x576x49152, 64 ids", (hidden, head, teacher.indices, teacher.values, *numbers)


declared = op(
    __name__,
    "(Tensor student_hidden, Tensor student_weight, Tensor teacher_ids, Tensor teacher_log_probs,"
    " Tensor? labels, Tensor? mask, float temperature, float cross_entropy, float softcap,"
    " bool hidden_gradient, bool weight_gradient) -> (Tensor, Tensor, Tensor)",
    differentiable=(0, 1),
)
shared.tie_gradient(declared, 11)
