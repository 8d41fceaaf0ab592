"""linear_kl_topk: the row kernel against k listed ids of a teacher and one bucket of the rest.

The listed logits are kept in registers and taken out of the row (set to -inf), so that sums over
the row are sums over the tail; their gradients are written last.

What it costs: three products and 10 bytes a 16-bit logit; no teacher's row is made or read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels import _head
from tailor_engine.kernels._device import LOWEST, accumulator, power_of_two, rounded_to, soft_cap
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


def describe(
    student_hidden: Tensor, student_weight: Tensor, teacher_ids: Tensor, *_: Any
) -> tuple[int, int, int, int]:
    """Return what a configuration depends on, of the op's positional arguments."""
    (tokens, k), vocabulary = teacher_ids.shape, student_weight.shape[0]
    return tokens, vocabulary, student_hidden.element_size(), k


def config(tokens: int, vocabulary: int, element_size: int, k: int) -> dict[str, int]:
    """Choose as `_head.config` says for one row a program; the listed ids are one vector."""
    return {**_head.config(tokens, vocabulary, element_size, 1), "slots": slots(k)}


def candidates(tokens: int, vocabulary: int, element_size: int, k: int) -> list[dict[str, int]]:
    """Return the choices that a measurement decides between, the usual one first."""
    found = _head.candidates(tokens, vocabulary, element_size, 1)
    return [{**chosen, "slots": slots(k)} for chosen in found]


def slots(k: int) -> int:
    """Return the power of two that holds k ids."""
    return power_of_two(k, 2, 1 << 20)


@triton.jit
def tail_block(
    row, start, vocabulary, stride, scale, low, cap, most, total, total_1,
    SUM_1: tl.constexpr, CAPPED: tl.constexpr, FINE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Add a block to the sums of each line."""
    z, _ = read(row, places(start, G, E), vocabulary, stride, cap, True, CAPPED, LAST, ACC)
    top, shrink, e = raised(z, most, scale, low, FINE)
    total = total * shrink + tl.sum(e, 1)
    if SUM_1:
        total_1 = total_1 * tl.exp(most - top) + tl.sum(tl.exp(z - top[:, None]), 1)
    return top, total, total_1


@triton.jit
def tail_sums(
    row, vocabulary, stride, scale, low, cap,
    SUM_1: tl.constexpr, CAPPED: tl.constexpr, FINE: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Return the tail's largest logit and its sums of exponentials, at the temperature and at 1.

    From the tail's own largest, not the row's: far below it they would vanish.
    """
    most = tl.full([G], LOWEST, ACC)
    total = tl.zeros([G], ACC)
    total_1 = tl.zeros([G], ACC)
    whole = vocabulary // (G * E) * (G * E)
    for start in range(0, whole, G * E):
        most, total, total_1 = tail_block(
            row, start, vocabulary, stride, scale, low, cap, most, total, total_1,
            SUM_1, CAPPED, FINE, False, ACC, G, E,
        )  # fmt: skip
    for start in range(whole, vocabulary, G * E):  # once or never
        most, total, total_1 = tail_block(
            row, start, vocabulary, stride, scale, low, cap, most, total, total_1,
            SUM_1, CAPPED, FINE, True, ACC, G, E,
        )  # fmt: skip
    top = tl.max(most, 0)
    total = tl.sum(total * shares(most, top, scale, low, FINE), 0)
    return top, total, tl.sum(total_1 * tl.exp(most - top), 0)


@triton.jit
def tail_gradient(
    row, start, vocabulary, stride, scale, low, cap, most, log_all, log_1, steep, entropy, label,
    HAS_ENTROPY: tl.constexpr, CAPPED: tl.constexpr, FINE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write a block's gradient over its logits; what was taken out gets anything.

    `log_all` is the tail's own sum: probabilities within a tail far below the rest do not vanish.
    """
    v = places(start, G, E)
    z, slope = read(row, v, vocabulary, stride, cap, True, CAPPED, LAST, ACC)
    gradient = steep * tl.exp2(softened(z - most, scale, low, FINE) - log_all)
    if HAS_ENTROPY:
        gradient += entropy * (tl.exp(z - most - log_1) - (v == label).to(ACC))
    write(row, v, rounded_to(gradient * slope, row.dtype.element_ty), stride, LAST)


@triton.jit
def row_kernel(
    logits, ids, log_probs, labels, divergence_share, entropy_share, loss, vocabulary, stride, k,
    scale, low, slope_factor, loss_factor, cap,
    HAS_DIVERGENCE: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_TAIL: tl.constexpr,
    TEMPERED: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, FINE: tl.constexpr,
    ACC: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into its loss and, in place, its gradient."""
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * stride
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
        slot = tl.arange(0, BK)
        at = tl.load(ids + t * k + slot, mask=slot < k, other=-1)
        listed = (at >= 0) & (at < vocabulary)  # an id out of range is not read, nor written
        at = tl.where(listed, at, 0)
        zk = tl.load(row + at, mask=listed, other=0).to(ACC)
        listed_slope = tl.full([BK], 1.0, ACC)
        if CAPPED:
            zk, listed_slope = soft_cap(zk, cap)
        zk = tl.where(listed, zk, LOWEST)
        label = -1
        labelled = tl.cast(0.0, ACC)
        if HAS_ENTROPY:
            label = tl.load(labels + t).to(tl.int32)
            labelled = tl.load(row + tl.minimum(tl.maximum(label, 0), vocabulary - 1)).to(ACC)
            if CAPPED:
                labelled, _ = soft_cap(labelled, cap)
        out = tl.full([BK], float("-inf"), ACC).to(logits.dtype.element_ty)
        tl.debug_barrier()  # every warp has read before one of them writes
        tl.store(row + at, out, mask=listed)
        tl.debug_barrier()
        top, tail_s, tail_1 = tail_sums(
            row, vocabulary, stride, scale, low, cap, HAS_ENTROPY and TEMPERED, CAPPED, FINE,
            ACC, G, E,
        )  # fmt: skip
        most = tl.maximum(top, tl.max(zk, 0))
        log_pk = softened(zk - most, scale, low, FINE)
        fall = softened(top - most, scale, low, FINE)
        # All logarithms of probabilities are in bits, all sums below the row's largest logit.
        log_s = tl.log2(tail_s * tl.exp2(fall) + tl.sum(tl.exp2(log_pk), 0))
        log_pk -= log_s
        log_1 = log_s * LN2
        if TEMPERED:
            log_1 = tl.log(tail_1 * tl.exp(top - most) + tl.sum(tl.exp(zk - most), 0))

        # The teacher: listed probabilities, and the mass that is left for the tail.
        log_q = tl.load(log_probs + t * k + slot, mask=listed & HAS_DIVERGENCE, other=float("-inf"))
        log_q = log_q.to(ACC)
        q = tl.exp(log_q)
        mass = tl.sum(q, 0)
        rest = tl.cast(0.0, ACC)
        divergence = tl.sum(tl.where(q > 0, q * (log_q - log_pk * LN2), 0.0), 0)
        log_tail = tl.cast(0.0, ACC)
        if HAS_TAIL:
            log_tail = fall + tl.log2(tail_s) - log_s
            rest = tl.maximum(1.0 - mass, 0.0)
            surprise = tl.log(tl.where(rest > 0, rest, 1.0)) - log_tail * LN2
            divergence += tl.where(rest > 0, rest * surprise, 0.0)
        mass += rest
        # p - target of a tail id, in units of its share of the tail: one difference for them all.
        excess = mass * tl.exp2(log_tail) - rest
        log_all = log_s + log_tail

        result = tl.cast(0.0, ACC)
        if HAS_DIVERGENCE:
            result = share * loss_factor * divergence
        if HAS_ENTROPY:
            result += entropy * (log_1 - (labelled - most))
        tl.store(loss + t, result)
        if GRADIENT:
            steep = share * slope_factor
            whole = vocabulary // (G * E) * (G * E)
            for start in range(whole, vocabulary, G * E):
                tail_gradient(
                    row, start, vocabulary, stride, scale, low, cap, most, log_all, log_1,
                    steep * excess, entropy, label,
                    HAS_ENTROPY, CAPPED, FINE, True, ACC, G, E,
                )  # fmt: skip
            for back in range(0, whole, G * E):
                tail_gradient(
                    row, whole - G * E - back, vocabulary, stride, scale, low, cap, most, log_all,
                    log_1, steep * excess, entropy, label,
                    HAS_ENTROPY, CAPPED, FINE, False, ACC, G, E,
                )  # fmt: skip
            slope = steep * (mass * tl.exp2(log_pk) - q)
            if HAS_ENTROPY:
                slope += entropy * (tl.exp(zk - most - log_1) - (at == label).to(ACC))
            slope *= listed_slope
            tl.debug_barrier()  # the listed places were just overwritten by other warps
            tl.store(row + at, rounded_to(slope, logits.dtype.element_ty), mask=listed)


def launch(
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
    chosen: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk over chunks of tokens: one product, the row kernel, two products."""
    dtype, vocabulary, k = student_hidden.dtype, len(student_weight), teacher_ids.shape[1]
    rows = _head.rows_of(student_hidden, labels, mask, cross_entropy)
    chosen = chosen or config(*describe(student_hidden, student_weight, teacher_ids))
    ids, log_probs = teacher_ids.contiguous(), teacher_log_probs.contiguous()
    targets = _head.pointer_or(labels, rows.entropy)
    loss = torch.empty_like(rows.entropy)

    def row_pass(logits: Tensor, begin: int, end: int) -> None:
        row_kernel[(end - begin,)](
            logits, ids[begin:], log_probs[begin:], targets[begin:],
            rows.divergence[begin:], rows.entropy[begin:], loss[begin:], vocabulary,
            chosen["stride"], k, *_head.factors(temperature), softcap,
            HAS_DIVERGENCE=cross_entropy < 1,
            HAS_ENTROPY=cross_entropy > 0 and labels is not None, HAS_TAIL=k < vocabulary,
            TEMPERED=temperature != 1, CAPPED=softcap > 0,
            GRADIENT=hidden_gradient or weight_gradient, FINE=dtype.itemsize > 2,
            ACC=accumulator(dtype), BK=chosen["slots"], G=chosen["lines"], E=chosen["lanes"],
            num_warps=chosen["warps"],
        )  # fmt: skip

    gradients = (hidden_gradient, weight_gradient)
    weight = student_weight.to(dtype)
    found = _head.chunks(student_hidden, weight, rows, chosen, gradients, row_pass)
    return loss.sum(), *found
