"""Distillation loss behind two linear heads, without the logits of all tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _linear_chunks as chunks
from tailor_engine.ops import _linear_loss as shared
from tailor_engine.ops._op import op, threads

DIVERGENCES = ("forward", "reverse", "jensen_shannon")


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    divergence: str = "forward",
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    softcap: float = 0.0,
    teacher_softcap: float = 0.0,
) -> Tensor:
    """Return how far the student's next-token probabilities are from the teacher's.

    ``(1 - w) * temperature^2 * divergence + w * cross_entropy(labels)`` with w = cross_entropy.
    Both terms are means over the rows that count: the divergence over the mask (without a mask:
    over rows whose label is not -100), the cross-entropy over those of them that have a label.
    No row: 0.
    Gradients reach student_hidden and student_weight; they are computed with the loss.

    Shapes: student_hidden [T, D], student_weight [V, D], teacher_hidden [T, E], teacher_weight
        [V, E], labels [T] (the token to predict, or -100) or None, mask [T] or None; the result
        is a scalar.
    Numbers: float32, bfloat16, float16 or float64 hidden states; weights are brought to their dtype
        for the products. Logits are softened by temperature and capped by softcap * tanh(z /
        softcap) where softcap is not 0. Sums, loss and the weight's gradient in float32 (float64
        for float64). Under autocast the products run in its dtype. labels int64, mask bool.
        divergence: "forward" KL(teacher | student), "reverse" KL(student | teacher), or
        "jensen_shannon" (half of each against their mean). With cross_entropy=1 no teacher is read.
    Raises: ValueError, TypeError for shapes, dtypes and numbers that do not fit.
    Source: Hinton et al. (arXiv 1503.02531), section 2; GKD (arXiv 2306.13649), equation 1.
    """
    hidden = shared.in_autocast(student_hidden)
    grad = torch.is_grad_enabled()
    with shared.without_autocast(student_hidden):
        outputs = torch.ops.tailor_engine.linear_kl(
            hidden, student_weight, teacher_hidden, teacher_weight, labels, mask, divergence,
            float(temperature), float(cross_entropy), float(softcap), float(teacher_softcap),
            grad and student_hidden.requires_grad, grad and student_weight.requires_grad,
        )  # fmt: skip
    return shared.sole_loss(outputs)


def _forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(teacher q | student p) and its gradient for the student's logits."""
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p.exp() - q


def _reverse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, ratio = log_p.exp(), log_p - log_q
    rows = (p * ratio).sum(-1)
    return rows, p * (ratio - rows[:, None])


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, log_m = log_p.exp(), torch.logaddexp(log_p, log_q) - math.log(2)
    student, teacher = log_p - log_m, log_q - log_m
    from_student = (p * student).sum(-1)
    rows = 0.5 * (from_student + (log_q.exp() * teacher).sum(-1))
    return rows, 0.5 * p * (student - from_student[:, None])


_DIVERGENCE = dict(zip(DIVERGENCES, (_forward, _reverse, _jensen_shannon), strict=True))


def reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    divergence: str,
    temperature: float,
    cross_entropy: float,
    softcap: float,
    teacher_softcap: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, d student_hidden [T, D], d student_weight [V, D]); see :func:`linear_kl`.

    A gradient that is not asked for is an empty tensor. This one holds all logits.
    """
    divergence_rows, entropy_rows = shared.row_weights(student_hidden, labels, mask)
    counted = (divergence_rows if cross_entropy < 1 else entropy_rows)[:, None] > 0
    hidden = torch.where(counted, student_hidden, 0)
    dtype, compute = hidden.dtype, shared.wide(hidden)
    logits = shared.capped((hidden @ student_weight.to(dtype).T).to(compute), softcap)
    loss, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    if cross_entropy < 1:
        teacher = torch.where(counted, teacher_hidden, 0).to(dtype)
        teacher_logits = (teacher @ teacher_weight.to(dtype).T).to(compute)
        teacher_logits = shared.capped(teacher_logits, teacher_softcap)
        rows, slope = _DIVERGENCE[divergence](
            torch.log_softmax(logits / temperature, -1),
            torch.log_softmax(teacher_logits / temperature, -1),
        )
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


def _cpu(
    native: Any,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    divergence: str,
    temperature: float,
    cross_entropy: float,
    softcap: float,
    teacher_softcap: float,
    *gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if student_hidden.dtype == torch.float64:  # for truths, not for speed
        return reference(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, mask,
            divergence, temperature, cross_entropy, softcap, teacher_softcap, *gradients,
        )  # fmt: skip
    with_teacher = cross_entropy < 1
    rows, labelled = chunks.counted_rows(labels, mask, with_teacher)
    total = student_hidden.shape[0] if rows is None else rows.numel()
    picked = labels if rows is None or labels is None else labels[rows]
    picked = None if picked is None else picked.contiguous()
    share = (1 - cross_entropy) * temperature**2 / max(total, 1)
    entropy_share = cross_entropy / max(labelled, 1)

    def kernel(chunk: chunks.Chunk, losses: Tensor) -> None:
        pointers = [logits.data_ptr() for logits in chunk.logits]
        native.linear_kl(
            pointers[0], pointers[-1], check.CODES[chunk.logits[0].dtype], *chunk.shape,
            check.pointer(None if picked is None else picked[chunk.part]),
            DIVERGENCES.index(divergence) if with_teacher else -1, share, entropy_share,
            temperature, softcap, teacher_softcap, any(gradients), chunk.sums.data_ptr(),
            losses.data_ptr(), threads(), *chunk.student, *chunk.teacher, *chunk.results,
        )  # fmt: skip

    teacher = (teacher_hidden, teacher_weight) if with_teacher else None
    return chunks.run(kernel, native, (student_hidden, student_weight), teacher, rows, *gradients)


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    divergence: str,
    temperature: float,
    cross_entropy: float,
    softcap: float,
    teacher_softcap: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> None:
    name = "linear_kl"
    shared.check_head(name, student_hidden, student_weight, "student")
    shared.check_head(name, teacher_hidden, teacher_weight, "teacher")
    tokens, vocabulary = student_hidden.shape[0], student_weight.shape[0]
    check.shape(name, "teacher_hidden", teacher_hidden, (tokens, teacher_hidden.shape[1]))
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            f"{name}: student and teacher must have one vocabulary, "
            f"got {vocabulary} and {teacher_weight.shape[0]} ids"
        )
    shared.check_targets(name, tokens, vocabulary, labels, mask)
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"{name}: divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}"
        )
    shared.check_numbers(name, temperature, cross_entropy, labels is not None)
    shared.check_softcap(name, "softcap", softcap)
    shared.check_softcap(name, "teacher_softcap", teacher_softcap)


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def arguments(  # one student, one teacher, and the numbers of a case
        tokens: int, hidden: int, other: int, vocabulary: int, *numbers: Any,
        dtype: torch.dtype = torch.float32, scale: float = 1.0, labels: bool = True,
        mask: Tensor | None = None, gradients: tuple[bool, bool] = (True, True),
    ) -> tuple:  # fmt: skip
        def normal(*shape: int) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(dtype)

        ids = torch.randint(vocabulary, (tokens,), generator=generator)
        ids[1::4] = shared.IGNORED
        return (
            normal(tokens, hidden), normal(vocabulary, hidden), normal(tokens, other),
            normal(vocabulary, other), ids if labels else None, mask, *numbers, *gradients,
        )  # fmt: skip

    half = torch.arange(37) % 2 == 0
    yield arguments(12, 12, 5, 30, "forward", 1.5, 0.3, 4.0, 3.0)
    yield arguments(1, 1, 1, 1, "forward", 1.0, 0.0, 0.0, 0.0, labels=False)
    yield arguments(0, 4, 4, 9, "reverse", 1.0, 0.5, 0.0, 0.0)
    yield arguments(37, 24, 16, 501, "forward", 2.0, 0.0, 0.0, 0.0, mask=half)
    yield arguments(
        37, 24, 16, 501, "reverse", 1.0, 0.4, 0.0, 5.0, mask=half, gradients=(True, False)
    )
    yield arguments(33, 24, 16, 1030, "jensen_shannon", 0.7, 0.5, 6.0, 0.0)
    yield arguments(70, 24, 16, 300, "jensen_shannon", 1.0, 0.0, 0.0, 0.0, gradients=(False, False))
    yield arguments(33, 24, 16, 130, "forward", 1.0, 1.0, 0.0, 0.0)
    yield arguments(33, 24, 24, 300, "forward", 1.0, 0.1, 0.0, 0.0, scale=4.0)
    # As wide as a real model: a running sum over all of it would lose digits that torch keeps.
    yield arguments(20, 576, 16, 2000, "forward", 1.0, 0.0, 0.0, 0.0, scale=0.2)
    for dtype in (torch.bfloat16, torch.float16):
        yield arguments(33, 48, 32, 300, "forward", 1.0, 0.5, 30.0, 0.0, dtype=dtype, scale=0.5)
    first, *rest = arguments(33, 48, 32, 300, "reverse", 1.0, 0.0, 0.0, 0.0, scale=0.5)
    yield first.bfloat16(), *rest  # what autocast hands over: float32 weights


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    hidden, weight = torch.zeros(3, 4), torch.zeros(7, 4)
    labels, mask = torch.tensor([0, -100, 6]), torch.ones(3, dtype=torch.bool)
    good = [hidden, weight, hidden, weight, labels, mask, "forward", 1.0, 0.5, 0.0, 0.0, True, True]

    def changed(position: int, value: Any) -> tuple:
        return (*good[:position], value, *good[position + 1 :])

    yield changed(0, hidden[None]), ValueError, "student_hidden must have 2 dimensions"
    yield changed(0, hidden.int()), TypeError, "student_hidden must be float32"
    yield changed(1, torch.zeros(7, 5)), ValueError, "student_weight must have shape [V, 4]"
    yield changed(2, hidden[:2]), ValueError, "teacher_hidden must have shape [3, 4], got [2, 4]"
    yield changed(3, torch.zeros(8, 4)), ValueError, "one vocabulary, got 7 and 8 ids"
    yield changed(4, labels[:2]), ValueError, "labels must have shape [3]"
    yield changed(4, labels.int()), TypeError, "labels must be int64"
    yield changed(4, labels + 1), ValueError, "labels must be from 0 to 6, or -100, got -99"
    yield changed(4, labels.clamp(min=7)), ValueError, "labels must be from 0 to 6, or -100, got 7"
    yield changed(4, None), ValueError, "cross_entropy=0.5 needs labels"
    yield changed(5, mask.float()), TypeError, "mask must be bool"
    yield changed(6, "backward"), ValueError, "divergence must be one of forward, reverse"
    yield changed(7, 0.0), ValueError, "temperature must be above 0, got 0.0"
    yield changed(8, 1.5), ValueError, "cross_entropy must be from 0 to 1, got 1.5"
    yield changed(9, -1.0), ValueError, "softcap must be 0 (none) or above, got -1.0"


def _cost(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    labels: Tensor | None, mask: Tensor | None, divergence: str, temperature: float,
    cross_entropy: float, softcap: float, teacher_softcap: float, hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[float, float]:  # fmt: skip
    """One read of the inputs and one write of the gradients; two to four products of all rows."""
    inputs = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    moved = sum(t.numel() * t.element_size() for t in inputs)
    moved += hidden_gradient * student_hidden.numel() * student_hidden.element_size()
    moved += weight_gradient * student_weight.numel() * 4
    student = (1 + hidden_gradient + weight_gradient) * student_hidden.shape[1]
    teacher = teacher_hidden.shape[1] if cross_entropy < 1 else 0
    return moved, 2 * student_hidden.shape[0] * student_weight.shape[0] * (student + teacher)


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    numbers = (None, None, "forward", 1.0, 0.0, 0.0, 0.0, True, True)
    for tokens, hidden, vocabulary, dtype in (
        (64, 576, 49152, torch.float32),
        (512, 576, 49152, torch.float32),
        (1024, 576, 49152, torch.float32),
        (512, 576, 49152, torch.bfloat16),
        (512, 2048, 32000, torch.float32),
    ):
        states = torch.randn(2, tokens, hidden).to(dtype)
        student, teacher = (torch.randn(2, vocabulary, hidden) / hidden**0.5).to(dtype)
        yield f"{tokens}x{hidden}x{vocabulary}", (states[0], student, states[1], teacher, *numbers)


declared = op(
    __name__,
    "(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight,"
    " Tensor? labels, Tensor? mask, str divergence, float temperature, float cross_entropy,"
    " float softcap, float teacher_softcap, bool hidden_gradient, bool weight_gradient)"
    " -> (Tensor, Tensor, Tensor)",
    differentiable=(0, 1),
)
shared.tie_gradient(declared, 13)
