"""linear_kl: torch's products, and between them one kernel a row that turns logits into gradients.

A row is read twice (three times for Jensen-Shannon, whose gradient needs a sum of the second read):
forwards for the largest logit and the sum of exponentials, then backwards for loss and gradient,
written over the student's logits. Backwards, because what was read last is still in the caches.

What it costs: the four products, and 14 bytes a pair of 16-bit logits (4 written by the products,
4 read and 2 written here, 4 read by the products of the gradients). At 3 TB/s and 1.75 GHz an H100
has 59 instructions a lane for the 6 bytes here; compiled, the forward divergence takes 31.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels import _head
from tailor_engine.kernels._device import LOWEST, accumulator, rounded_to, soft_cap
from tailor_engine.kernels._rows import (
    LN2,
    places,
    raised,
    read,
    shares,
    softened,
    write,
    write_zeros,
)

NONE, FORWARD, REVERSE, JENSEN_SHANNON = range(4)
DIVERGENCE, CROSS_ENTROPY = 4, 6  # their places behind the first two
KINDS = {"forward": FORWARD, "reverse": REVERSE, "jensen_shannon": JENSEN_SHANNON}


def describe(
    student_hidden: Tensor, student_weight: Tensor, *rest: Any
) -> tuple[int, int, int, int]:
    """Return what a configuration depends on, of the op's positional arguments."""
    kind = KINDS[rest[DIVERGENCE]] if rest[CROSS_ENTROPY] < 1 else NONE
    return len(student_hidden), len(student_weight), student_hidden.element_size(), kind


def limits(kind: int) -> tuple[int, int]:
    """Return the rows that a program reads, and its warps at most.

    Jensen-Shannon with all options needs 80 registers a thread: compiled for sm_80 it spills a few
    at 16 and 32 warps (for sm_90 it does not: the candidates offer both).
    """
    return 1 if kind == NONE else 2, 8 if kind == JENSEN_SHANNON else 32


def config(tokens: int, vocabulary: int, element_size: int, kind: int = FORWARD) -> dict[str, int]:
    """Choose as `_head.config` says: a program reads a student's row and a teacher's."""
    return _head.config(tokens, vocabulary, element_size, *limits(kind))


def candidates(
    tokens: int, vocabulary: int, element_size: int, kind: int = FORWARD
) -> list[dict[str, int]]:
    """Return the choices that a measurement decides between, the usual one first."""
    return _head.candidates(tokens, vocabulary, element_size, *limits(kind))


@triton.jit
def first_block(
    row, teacher_row, start, vocabulary, stride, scale, low, cap, teacher_cap, apart,
    most, sum_s, sum_1, most_t, sum_t, sum_r,
    KIND: tl.constexpr, SUM_1: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    FINE: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Add a block to the sums of each line; see `first_read`."""
    v = places(start, G, E)
    z, _ = read(row, v, vocabulary, stride, cap, False, CAPPED, LAST, ACC)
    top, shrink, e = raised(z, most, scale, low, FINE)
    if KIND != 0:
        q, _ = read(
            teacher_row, v, vocabulary, stride, teacher_cap, False, TEACHER_CAPPED, LAST, ACC
        )
        top_t, shrink_t, e_t = raised(q, most_t, scale, low, FINE)
        sum_t = sum_t * shrink_t + tl.sum(e_t, 1)
        most_t = top_t
        if KIND == 2:
            ratio = softened(z - q - apart, scale, low, FINE)
            if LAST:
                ratio = tl.where(v < vocabulary, ratio, 0.0)
            sum_r = sum_r * shrink + tl.sum(e * ratio, 1)
    sum_s = sum_s * shrink + tl.sum(e, 1)
    if SUM_1:
        sum_1 = sum_1 * tl.exp(most - top) + tl.sum(tl.exp(z - top[:, None]), 1)
    return top, sum_s, sum_1, most_t, sum_t, sum_r


@triton.jit
def first_read(
    row, teacher_row, vocabulary, stride, scale, low, cap, teacher_cap, apart,
    KIND: tl.constexpr, SUM_1: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    FINE: tl.constexpr, ACC: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Return the largest logits, the sums of exponentials below them, and the reverse's sum.

    That is of the student's exponentials times the ratio of the two, in bits. All ratios are
    taken from that of the first token: two models' logits may lie far apart, and their
    differences would cancel.
    """
    most = tl.full([G], LOWEST, ACC)
    most_t = tl.full([G], LOWEST, ACC)
    sum_s = tl.zeros([G], ACC)
    sum_1 = tl.zeros([G], ACC)
    sum_t = tl.zeros([G], ACC)
    sum_r = tl.zeros([G], ACC)
    whole = vocabulary // (G * E) * (G * E)
    for start in range(0, whole, G * E):
        most, sum_s, sum_1, most_t, sum_t, sum_r = first_block(
            row, teacher_row, start, vocabulary, stride, scale, low, cap, teacher_cap, apart,
            most, sum_s, sum_1, most_t, sum_t, sum_r,
            KIND, SUM_1, CAPPED, TEACHER_CAPPED, FINE, False, ACC, G, E,
        )  # fmt: skip
    for start in range(whole, vocabulary, G * E):  # once or never
        most, sum_s, sum_1, most_t, sum_t, sum_r = first_block(
            row, teacher_row, start, vocabulary, stride, scale, low, cap, teacher_cap, apart,
            most, sum_s, sum_1, most_t, sum_t, sum_r,
            KIND, SUM_1, CAPPED, TEACHER_CAPPED, FINE, True, ACC, G, E,
        )  # fmt: skip
    top, top_t = tl.max(most, 0), tl.max(most_t, 0)
    share = shares(most, top, scale, low, FINE)
    sum_s = tl.sum(sum_s * share, 0)
    sum_r = tl.sum(sum_r * share, 0)
    sum_1 = tl.sum(sum_1 * tl.exp(most - top), 0)
    sum_t = tl.sum(sum_t * shares(most_t, top_t, scale, low, FINE), 0)
    return top, top_t, sum_s, sum_1, sum_t, sum_r


@triton.jit
def to_mean(log_p, log_q):
    """Return log2(p / m) with m = (p + q) / 2, from the ratio alone; exact where p is near q."""
    ratio = log_p - log_q
    return tl.minimum(ratio, 0.0) + (1.0 - tl.log2(1.0 + tl.exp2(-tl.abs(ratio))))


@triton.jit
def mean_block(
    row, teacher_row, start, vocabulary, stride, scale, low, cap, teacher_cap,
    most, most_t, log_s, log_t, total,
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, FINE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Add a block's p log2(p / m) to the sums of each line."""
    v = places(start, G, E)
    z, _ = read(row, v, vocabulary, stride, cap, False, CAPPED, LAST, ACC)
    q, _ = read(teacher_row, v, vocabulary, stride, teacher_cap, False, TEACHER_CAPPED, LAST, ACC)
    log_p = softened(z - most, scale, low, FINE) - log_s
    log_q = softened(q - most_t, scale, low, FINE) - log_t
    value = tl.exp2(log_p) * to_mean(log_p, log_q)
    if LAST:
        value = tl.where(v < vocabulary, value, 0.0)
    return total + tl.sum(value, 1)


@triton.jit
def last_block(
    row, teacher_row, start, vocabulary, stride, scale, low, cap, teacher_cap, apart,
    most, most_t, log_s, log_t, log_1, mean, steep, entropy, label, total,
    KIND: tl.constexpr, HAS_ENTROPY: tl.constexpr, TEMPERED: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, GRADIENT: tl.constexpr, FINE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write a block's gradient over its logits; add its divergence to the sums of each line."""
    v = places(start, G, E)
    z, slope = read(row, v, vocabulary, stride, cap, False, CAPPED, LAST, ACC)
    log_p = softened(z - most, scale, low, FINE) - log_s
    p = tl.exp2(log_p)
    gradient = tl.zeros([G, E], ACC)
    if KIND != 0:
        q, _ = read(
            teacher_row, v, vocabulary, stride, teacher_cap, False, TEACHER_CAPPED, LAST, ACC
        )
        if KIND == 2:
            gradient = steep * p * (softened(z - q - apart, scale, low, FINE) - mean)
        else:
            log_q = softened(q - most_t, scale, low, FINE) - log_t
            teacher = tl.exp2(log_q)
            if KIND == 1:
                value = teacher * (log_q - log_p)
                gradient = steep * (p - teacher)
            else:
                student = p * to_mean(log_p, log_q)
                value = 0.5 * (student + teacher * to_mean(log_q, log_p))
                gradient = steep * (student - p * mean)
            if LAST:
                value = tl.where(v < vocabulary, value, 0.0)
            total += tl.sum(value, 1)
    if HAS_ENTROPY:
        p_1 = p
        if TEMPERED:
            p_1 = tl.exp(z - most - log_1)
        gradient += entropy * (p_1 - (v == label).to(ACC))
    if GRADIENT:
        write(row, v, rounded_to(gradient * slope, row.dtype.element_ty), stride, LAST)
    return total


@triton.jit
def row_kernel(
    logits, teacher_logits, labels, divergence_share, entropy_share, loss, vocabulary, stride,
    scale, low, slope_factor, loss_factor, cap, teacher_cap,
    KIND: tl.constexpr, HAS_ENTROPY: tl.constexpr, TEMPERED: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, GRADIENT: tl.constexpr, FINE: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into its loss and, in place, its gradient."""
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * stride
    teacher_row = teacher_logits + t * stride
    share = tl.load(divergence_share + t).to(ACC)
    entropy = tl.load(entropy_share + t).to(ACC)
    if (share == 0) & (entropy == 0):
        tl.store(loss + t, share)
        if GRADIENT:
            write_zeros(row, stride, G, E)
    else:
        scale = tl.cast(scale, ACC)
        low = tl.cast(low, ACC)
        cap = tl.cast(cap, ACC)
        teacher_cap = tl.cast(teacher_cap, ACC)
        # Read before the row is overwritten: the sums that follow keep the warps in step.
        label = -1
        labelled = tl.cast(0.0, ACC)
        if HAS_ENTROPY:
            label = tl.load(labels + t).to(tl.int32)
            labelled = tl.load(row + tl.minimum(tl.maximum(label, 0), vocabulary - 1)).to(ACC)
            if CAPPED:
                labelled, _ = soft_cap(labelled, cap)
        apart = tl.cast(0.0, ACC)
        if KIND == 2:
            first, first_t = tl.load(row).to(ACC), tl.load(teacher_row).to(ACC)
            if CAPPED:
                first, _ = soft_cap(first, cap)
            if TEACHER_CAPPED:
                first_t, _ = soft_cap(first_t, teacher_cap)
            apart = first - first_t
        most, most_t, sum_s, sum_1, sum_t, sum_r = first_read(
            row, teacher_row, vocabulary, stride, scale, low, cap, teacher_cap, apart,
            KIND, HAS_ENTROPY and TEMPERED, CAPPED, TEACHER_CAPPED, FINE, ACC, G, E,
        )  # fmt: skip
        log_s = tl.log2(sum_s)
        log_t = tl.log2(sum_t) if KIND != 0 else log_s
        log_1 = tl.log(sum_1) if TEMPERED else log_s * LN2
        mean = sum_r / sum_s
        whole = vocabulary // (G * E) * (G * E)
        if KIND == 3:  # one more read: the mean of log2 p - log2 m under p
            total = tl.zeros([G], ACC)
            for start in range(whole, vocabulary, G * E):
                total = mean_block(
                    row, teacher_row, start, vocabulary, stride, scale, low, cap, teacher_cap,
                    most, most_t, log_s, log_t, total,
                    CAPPED, TEACHER_CAPPED, FINE, True, ACC, G, E,
                )  # fmt: skip
            for back in range(0, whole, G * E):
                total = mean_block(
                    row, teacher_row, whole - G * E - back, vocabulary, stride, scale, low,
                    cap, teacher_cap, most, most_t, log_s, log_t, total,
                    CAPPED, TEACHER_CAPPED, FINE, False, ACC, G, E,
                )  # fmt: skip
            mean = tl.sum(total, 0)

        # Of the bits: the forward gradient is free of them, the others carry a logarithm.
        steep = share * slope_factor * (1.0 if KIND == 1 else LN2 * (0.5 if KIND == 3 else 1.0))
        total = tl.zeros([G], ACC)
        for start in range(whole, vocabulary, G * E):
            total = last_block(
                row, teacher_row, start, vocabulary, stride, scale, low, cap, teacher_cap, apart,
                most, most_t, log_s, log_t, log_1, mean, steep, entropy, label, total,
                KIND, HAS_ENTROPY, TEMPERED, CAPPED, TEACHER_CAPPED, GRADIENT, FINE, True,
                ACC, G, E,
            )  # fmt: skip
        for back in range(0, whole, G * E):
            total = last_block(
                row, teacher_row, whole - G * E - back, vocabulary, stride, scale, low,
                cap, teacher_cap, apart,
                most, most_t, log_s, log_t, log_1, mean, steep, entropy, label, total,
                KIND, HAS_ENTROPY, TEMPERED, CAPPED, TEACHER_CAPPED, GRADIENT, FINE, False,
                ACC, G, E,
            )  # fmt: skip

        divergence = tl.sum(total, 0)
        if KIND == 2:
            divergence = mean + softened(apart - most + most_t, scale, low, FINE) - log_s + log_t
        result = share * loss_factor * LN2 * divergence
        if HAS_ENTROPY:
            result += entropy * (log_1 - (labelled - most))
        tl.store(loss + t, result)


def launch(
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
    chosen: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk over chunks of tokens: two products, the row kernel, two products."""
    dtype, vocabulary = student_hidden.dtype, len(student_weight)
    kind = KINDS[divergence] if cross_entropy < 1 else NONE
    rows = _head.rows_of(student_hidden, labels, mask, cross_entropy)
    chosen = chosen or config(len(student_hidden), vocabulary, dtype.itemsize, kind)
    weight, teacher_head = student_weight.to(dtype), teacher_weight.to(dtype)
    targets = _head.pointer_or(labels, rows.entropy)
    loss = torch.empty_like(rows.entropy)
    if kind != NONE:
        teacher_buffer = _head.logits_buffer(teacher_head, chosen)

    def row_pass(logits: Tensor, begin: int, end: int) -> None:
        teacher = logits
        if kind != NONE:
            part = teacher_hidden[begin:end].to(dtype)
            teacher = torch.mm(part, teacher_head.t(), out=teacher_buffer[: end - begin])
        row_kernel[(end - begin,)](
            logits, teacher, targets[begin:], rows.divergence[begin:], rows.entropy[begin:],
            loss[begin:], vocabulary, chosen["stride"], *_head.factors(temperature),
            softcap, teacher_softcap,
            KIND=kind, HAS_ENTROPY=cross_entropy > 0 and labels is not None,
            TEMPERED=temperature != 1, CAPPED=softcap > 0, TEACHER_CAPPED=teacher_softcap > 0,
            GRADIENT=hidden_gradient or weight_gradient, FINE=dtype.itemsize > 2,
            ACC=accumulator(dtype), G=chosen["lines"], E=chosen["lanes"],
            num_warps=chosen["warps"],
        )  # fmt: skip

    gradients = (hidden_gradient, weight_gradient)
    found = _head.chunks(student_hidden, weight, rows, chosen, gradients, row_pass)
    return loss.sum(), *found
