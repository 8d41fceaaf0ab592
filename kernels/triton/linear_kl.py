"""linear_kl: torch's products, and between them one kernel a row that turns logits into gradients.

A row is read twice (three times for Jensen-Shannon, whose gradient needs a sum of the second read):
first for the largest logit and the sum of exponentials, then for loss and gradient, written over
the student's logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import LOWEST, accumulator, rounded_to, soft_cap, softened
from tailor_engine.kernels._head import chunks, config, factors, pointer_or, rows_of

NONE, FORWARD, REVERSE, JENSEN_SHANNON = range(4)
KINDS = {"forward": FORWARD, "reverse": REVERSE, "jensen_shannon": JENSEN_SHANNON}


@triton.jit
def read_sloped(row, v, vocabulary, cap, CAPPED: tl.constexpr, ACC: tl.constexpr):
    """Return a block of (capped) logits, LOWEST behind the end, and the cap's derivative."""
    z = tl.load(row + v, mask=v < vocabulary, other=0).to(ACC)
    slope = 1.0
    if CAPPED:
        z, slope = soft_cap(z, cap)
    return tl.where(v < vocabulary, z, LOWEST), slope


@triton.jit
def read(row, v, vocabulary, cap, CAPPED: tl.constexpr, ACC: tl.constexpr):
    """Return the logits alone: a loop cannot carry a name that it does not use."""
    z, _ = read_sloped(row, v, vocabulary, cap, CAPPED, ACC)
    return z


@triton.jit
def write_zeros(row, vocabulary, BV: tl.constexpr):
    """Give a row that does not count no gradient."""
    for start in range(0, vocabulary, BV):
        v = start + tl.arange(0, BV)
        tl.store(row + v, tl.zeros([BV], row.dtype.element_ty), mask=v < vocabulary)


@triton.jit
def first_read(
    row, teacher_row, vocabulary, scale, low, cap, teacher_cap,
    KIND: tl.constexpr, SUM_1: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Return the largest logits, the sums of exponentials below them, and the reverse's two values.

    Those are the teacher's logit at the student's largest, and the sum of exponentials times the
    ratio of the two, both taken from there: differences of large logits would cancel.
    """
    most = tl.full([1], LOWEST, ACC)
    most_t = tl.full([1], LOWEST, ACC)
    there = tl.zeros([1], ACC)
    sum_s = tl.zeros([1], ACC)
    sum_1 = tl.zeros([1], ACC)
    sum_t = tl.zeros([1], ACC)
    sum_r = tl.zeros([1], ACC)
    for start in range(0, vocabulary, BV):
        v = start + tl.arange(0, BV)
        z = read(row, v, vocabulary, cap, CAPPED, ACC)
        here = tl.max(z, 0)
        top = tl.maximum(most, here)
        shrink = tl.exp(softened(most - top, scale, low))
        e = tl.exp(softened(z - top, scale, low))
        if KIND != 0:
            q = read(teacher_row, v, vocabulary, teacher_cap, TEACHER_CAPPED, ACC)
            top_t = tl.maximum(most_t, tl.max(q, 0))
            sum_t *= tl.exp(softened(most_t - top_t, scale, low))
            sum_t += tl.sum(tl.exp(softened(q - top_t, scale, low)), 0)
            most_t = top_t
            if KIND == 2:
                at_top = tl.max(tl.where(z == here, q, LOWEST), 0)
                at_top = tl.where(here > most, at_top, there)
                moved = softened((most - top) - (there - at_top), scale, low)
                ratio = tl.where(
                    v < vocabulary, softened((z - top) - (q - at_top), scale, low), 0.0
                )
                sum_r = shrink * (sum_r + moved * sum_s) + tl.sum(e * ratio, 0)
                there = at_top
        sum_s = sum_s * shrink + tl.sum(e, 0)
        if SUM_1:
            sum_1 = sum_1 * tl.exp(most - top) + tl.sum(tl.exp(z - top), 0)
        most = top
    return most, most_t, sum_s, sum_1, sum_t, there, sum_r


@triton.jit
def jensen_shannon(log_p, log_q, inside):
    """Return (p * log(p / m), q * log(q / m)) with m = (p + q) / 2, from the ratio alone."""
    ratio = tl.where(inside, log_p - log_q, 0.0)
    away = 0.6931471805599453 - tl.log(1.0 + tl.exp(-tl.abs(ratio)))
    student = tl.where(inside, tl.exp(log_p), 0.0) * (tl.minimum(ratio, 0.0) + away)
    teacher = tl.where(inside, tl.exp(log_q), 0.0) * (tl.minimum(-ratio, 0.0) + away)
    return student, teacher


@triton.jit
def row_kernel(
    logits, teacher_logits, labels, divergence_share, entropy_share, loss, vocabulary,
    scale, low, slope_factor, loss_factor, cap, teacher_cap,
    KIND: tl.constexpr, HAS_ENTROPY: tl.constexpr, TEMPERED: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into its loss and, in place, its gradient."""
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * vocabulary
    teacher_row = teacher_logits + t * vocabulary
    share = tl.load(divergence_share + t).to(ACC)
    entropy = tl.load(entropy_share + t).to(ACC)
    if (share == 0) & (entropy == 0):
        tl.store(loss + t, share)
        if GRADIENT:
            write_zeros(row, vocabulary, BV)
    else:
        scale = tl.cast(scale, ACC)
        low = tl.cast(low, ACC)
        cap = tl.cast(cap, ACC)
        teacher_cap = tl.cast(teacher_cap, ACC)
        # Read before the row is overwritten: the sums that follow keep the warps in step.
        label = tl.full([1], -1, tl.int32)
        labelled = tl.zeros([1], ACC)
        if HAS_ENTROPY:
            label = tl.load(labels + t + tl.arange(0, 1)).to(tl.int32)
            labelled = read(row, tl.maximum(label, 0), vocabulary, cap, CAPPED, ACC)
        most, most_t, sum_s, sum_1, sum_t, there, sum_r = first_read(
            row, teacher_row, vocabulary, scale, low, cap, teacher_cap,
            KIND, HAS_ENTROPY and TEMPERED, CAPPED, TEACHER_CAPPED, ACC, BV,
        )  # fmt: skip
        log_s = tl.log(sum_s)
        log_t = tl.log(sum_t)
        log_1 = tl.log(sum_1) if TEMPERED else log_s
        mean = sum_r / sum_s
        if KIND == 3:  # one more read: the mean of log p - log m under p
            total = tl.zeros([BV], ACC)
            for start in range(0, vocabulary, BV):
                v = start + tl.arange(0, BV)
                z = read(row, v, vocabulary, cap, CAPPED, ACC)
                q = read(teacher_row, v, vocabulary, teacher_cap, TEACHER_CAPPED, ACC)
                log_p, log_q = (
                    softened(z - most, scale, low) - log_s,
                    softened(q - most_t, scale, low) - log_t,
                )
                student, teacher = jensen_shannon(log_p, log_q, v < vocabulary)
                total += student
            mean = tl.sum(total, 0) + tl.zeros([1], ACC)

        total = tl.zeros([BV], ACC)
        for start in range(0, vocabulary, BV):
            v = start + tl.arange(0, BV)
            inside = v < vocabulary
            z, slope = read_sloped(row, v, vocabulary, cap, CAPPED, ACC)
            log_p = softened(z - most, scale, low) - log_s
            p = tl.exp(log_p)
            gradient = tl.zeros([BV], ACC)
            steep = share * slope_factor
            if KIND != 0:
                q = read(teacher_row, v, vocabulary, teacher_cap, TEACHER_CAPPED, ACC)
                log_q = softened(q - most_t, scale, low) - log_t
                if KIND == 1:
                    teacher = tl.exp(log_q)
                    total += tl.where(inside, teacher * (log_q - log_p), 0.0)
                    gradient = steep * (p - teacher)
                elif KIND == 2:
                    gradient = steep * p * (softened((z - most) - (q - there), scale, low) - mean)
                else:
                    student, teacher = jensen_shannon(log_p, log_q, inside)
                    total += 0.5 * (student + teacher)
                    gradient = steep * 0.5 * (student - p * mean)
            if HAS_ENTROPY:
                gradient += entropy * (tl.exp(z - most - log_1) - (v == label).to(ACC))
            if GRADIENT:
                gradient *= slope
                tl.store(row + v, rounded_to(gradient, logits.dtype.element_ty), mask=inside)

        divergence = tl.sum(total, 0) + tl.zeros([1], ACC)
        if KIND == 2:
            divergence = mean - softened(there - most_t, scale, low) - log_s + log_t
        result = share * loss_factor * divergence
        if HAS_ENTROPY:
            result += entropy * (log_1 - (labelled - most))
        tl.store(loss + t + tl.arange(0, 1), result)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk over chunks of tokens: two products, the row kernel, two products."""
    dtype, (tokens, vocabulary) = student_hidden.dtype, (len(student_hidden), len(student_weight))
    kind = KINDS[divergence] if cross_entropy < 1 else NONE
    rows = rows_of(student_hidden, labels, mask, cross_entropy)
    chosen = config(tokens, vocabulary, student_hidden.element_size())
    weight, teacher_head = student_weight.to(dtype), teacher_weight.to(dtype)
    targets = pointer_or(labels, rows.entropy)
    loss = torch.empty_like(rows.entropy)
    if kind != NONE:
        teacher_buffer = weight.new_empty(chosen["tokens"], vocabulary)

    def row_pass(logits: Tensor, begin: int, end: int) -> None:
        teacher = logits
        if kind != NONE:
            part = teacher_hidden[begin:end].to(dtype)
            teacher = torch.mm(part, teacher_head.t(), out=teacher_buffer[: end - begin])
        row_kernel[(end - begin,)](
            logits, teacher, targets[begin:], rows.divergence[begin:], rows.entropy[begin:],
            loss[begin:], vocabulary, *factors(temperature),
            softcap, teacher_softcap,
            KIND=kind, HAS_ENTROPY=cross_entropy > 0 and labels is not None,
            TEMPERED=temperature != 1, CAPPED=softcap > 0, TEACHER_CAPPED=teacher_softcap > 0,
            GRADIENT=hidden_gradient or weight_gradient, ACC=accumulator(dtype),
            BV=chosen["block_v"], num_warps=chosen["warps"],
        )  # fmt: skip

    gradients = (hidden_gradient, weight_gradient)
    found = chunks(student_hidden, weight, rows, chosen["tokens"], gradients, row_pass)
    return loss.sum(), *found
