"""linear_kl_topk: the row kernel against k listed ids of a teacher and one bucket of the rest.

The listed logits are kept in registers and taken out of the row (set to -inf), so that sums over
the row are sums over the tail; their gradients are written last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import (
    LOWEST,
    accumulator,
    power_of_two,
    rounded_to,
    soft_cap,
    softened,
)
from tailor_engine.kernels._head import chunks, config, factors, pointer_or, rows_of
from tailor_engine.kernels.linear_kl import write_zeros


@triton.jit
def read_sloped(row, v, inside, cap, CAPPED: tl.constexpr, ACC: tl.constexpr):
    """Return (capped) logits, LOWEST where none is left, and the derivative of the cap."""
    z = tl.load(row + v, mask=inside, other=float("-inf")).to(ACC)
    gone = z == float("-inf")
    slope = 1.0
    if CAPPED:
        z, slope = soft_cap(z, cap)
    return tl.where(gone, LOWEST, z), slope


@triton.jit
def read(row, v, inside, cap, CAPPED: tl.constexpr, ACC: tl.constexpr):
    """Return the logits alone: a loop cannot carry a name that it does not use."""
    z, _ = read_sloped(row, v, inside, cap, CAPPED, ACC)
    return z


@triton.jit
def tail_sums(
    row, vocabulary, scale, low, cap,
    SUM_1: tl.constexpr, CAPPED: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Return the tail's largest logit and its sums of exponentials, at the temperature and at 1.

    From the tail's own largest, not the row's: far below it they would vanish.
    """
    most = tl.full([1], LOWEST, ACC)
    total = tl.zeros([1], ACC)
    total_1 = tl.zeros([1], ACC)
    for start in range(0, vocabulary, BV):
        v = start + tl.arange(0, BV)
        z = read(row, v, v < vocabulary, cap, CAPPED, ACC)
        top = tl.maximum(most, tl.max(z, 0))
        total *= tl.exp(softened(most - top, scale, low))
        total += tl.sum(tl.exp(softened(z - top, scale, low)), 0)
        if SUM_1:
            total_1 = total_1 * tl.exp(most - top) + tl.sum(tl.exp(z - top), 0)
        most = top
    return most, total, total_1


@triton.jit
def row_kernel(
    logits, ids, log_probs, labels, divergence_share, entropy_share, loss, vocabulary, k,
    scale, low, slope_factor, loss_factor, cap,
    HAS_DIVERGENCE: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_TAIL: tl.constexpr,
    TEMPERED: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
    ACC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into its loss and, in place, its gradient."""
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * vocabulary
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
        slot = tl.arange(0, BK)
        listed = slot < k
        at = tl.load(ids + t * k + slot, mask=listed, other=0)
        zk, listed_slope = read_sloped(row, at, listed, cap, CAPPED, ACC)
        label = tl.full([1], -1, tl.int32)
        labelled = tl.zeros([1], ACC)
        if HAS_ENTROPY:
            label = tl.load(labels + t + tl.arange(0, 1)).to(tl.int32)
            labelled = read(row, tl.maximum(label, 0), label >= -100, cap, CAPPED, ACC)
        out = tl.full([BK], float("-inf"), ACC).to(logits.dtype.element_ty)
        tl.debug_barrier()  # every warp has read before one of them writes
        tl.store(row + at, out, mask=listed)
        tl.debug_barrier()
        top, tail_s, tail_1 = tail_sums(
            row, vocabulary, scale, low, cap, HAS_ENTROPY and TEMPERED, CAPPED, ACC, BV
        )
        most = tl.maximum(top, tl.max(zk, 0))
        sum_s = tail_s * tl.exp(softened(top - most, scale, low)) + tl.sum(
            tl.exp(softened(zk - most, scale, low)), 0
        )
        log_s = tl.log(sum_s)  # logarithms of sums are all taken from the row's largest logit
        log_1 = log_s
        if TEMPERED:
            log_1 = tl.log(tail_1 * tl.exp(top - most) + tl.sum(tl.exp(zk - most), 0))

        # The teacher: listed probabilities, and the mass that is left for the tail.
        log_q = tl.load(log_probs + t * k + slot, mask=listed & HAS_DIVERGENCE, other=float("-inf"))
        log_q = log_q.to(ACC)
        q = tl.exp(log_q)
        mass = tl.sum(q, 0) + tl.zeros([1], ACC)
        rest = tl.zeros([1], ACC)
        divergence = tl.where(q > 0, q * (log_q - softened(zk - most, scale, low) + log_s), 0.0)
        divergence = tl.sum(divergence, 0) + tl.zeros([1], ACC)
        log_tail = log_s
        if HAS_TAIL:
            log_tail = softened(top - most, scale, low) + tl.log(tail_s)
            rest = tl.maximum(1.0 - mass, 0.0)
            surprise = tl.log(tl.where(rest > 0, rest, 1.0)) - (log_tail - log_s)
            divergence += tl.where(rest > 0, rest * surprise, 0.0)
        mass += rest
        # p - target of a tail id, in units of its share of the tail: one difference for them all.
        excess = mass * tl.exp(log_tail - log_s) - rest

        result = tl.zeros([1], ACC)
        if HAS_DIVERGENCE:
            result = share * loss_factor * divergence
        if HAS_ENTROPY:
            result += entropy * (log_1 - (labelled - most))
        tl.store(loss + t + tl.arange(0, 1), result)
        if GRADIENT:
            for start in range(0, vocabulary, BV):
                v = start + tl.arange(0, BV)
                z, cap_slope = read_sloped(row, v, v < vocabulary, cap, CAPPED, ACC)
                power = softened(z - most, scale, low)
                slope = share * slope_factor * excess * tl.exp(power - log_tail)
                if HAS_ENTROPY:
                    slope += entropy * (tl.exp(z - most - log_1) - (v == label).to(ACC))
                slope *= cap_slope
                slope = rounded_to(slope, logits.dtype.element_ty)
                tl.store(row + v, slope, mask=v < vocabulary)
            slope = (
                share * slope_factor * (mass * tl.exp(softened(zk - most, scale, low) - log_s) - q)
            )
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk over chunks of tokens: one product, the row kernel, two products."""
    dtype, (tokens, vocabulary) = student_hidden.dtype, (len(student_hidden), len(student_weight))
    k = teacher_ids.shape[1]
    rows = rows_of(student_hidden, labels, mask, cross_entropy)
    chosen = config(tokens, vocabulary, student_hidden.element_size())
    ids, log_probs = teacher_ids.contiguous(), teacher_log_probs.contiguous()
    targets = pointer_or(labels, rows.entropy)
    loss = torch.empty_like(rows.entropy)

    def row_pass(logits: Tensor, begin: int, end: int) -> None:
        row_kernel[(end - begin,)](
            logits, ids[begin:], log_probs[begin:], targets[begin:],
            rows.divergence[begin:], rows.entropy[begin:], loss[begin:], vocabulary, k,
            *factors(temperature), softcap,
            HAS_DIVERGENCE=cross_entropy < 1,
            HAS_ENTROPY=cross_entropy > 0 and labels is not None, HAS_TAIL=k < vocabulary,
            TEMPERED=temperature != 1, CAPPED=softcap > 0,
            GRADIENT=hidden_gradient or weight_gradient, ACC=accumulator(dtype),
            BK=power_of_two(k, 2, 1 << 20), BV=chosen["block_v"], num_warps=chosen["warps"],
        )  # fmt: skip

    gradients = (hidden_gradient, weight_gradient)
    weight = student_weight.to(dtype)
    found = chunks(student_hidden, weight, rows, chosen["tokens"], gradients, row_pass)
    return loss.sum(), *found
