"""Rounding that repairs as it goes: what one column loses, the columns after it make good."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._layout import pack_nibbles
from tailor_engine.ops.packed import PackedWeight, search_clip


@dataclass(frozen=True)
class Format:
    """Bits of a weight; the group and the zero points of 4 bits; whether clips are searched."""

    bits: int
    group: int
    symmetric: bool
    clip_search: bool


def nearest(weight: Tensor, form: Format, importance: Tensor | None) -> PackedWeight:
    """Round each weight [N, K] to nearest.

    Shapes: importance [K], the mean square of each input, weighs the clip search; None: all alike.
    """
    return PackedWeight.quantize(
        weight, form.bits, form.group, form.symmetric, _clip(weight, form, importance)
    )


def compensated(weight: Tensor, form: Format, moment: Tensor, ridge: float) -> PackedWeight:
    """Round column by column, the rest of each row corrected for what rounding has lost so far.

    Shapes: weight [N, K]; moment [K, K], the mean of x x^T over the inputs of this weight.
    Numbers: the inverse in float64, damped by ``ridge`` times the mean diagonal, more where the
        factorisation still fails; the sweep in float32. K must be a multiple of the group.
    Source: Frantar et al., GPTQ (2210.17323), algorithm 1, groups whose scale is taken from the
        weights as corrected so far.
    """
    factor = _inverse_factor(moment, ridge)
    clip = _clip(weight, form, moment.diagonal().float())
    rest = weight.clone()
    rows, width = weight.shape
    block = form.group or 128
    codes, scales, zeros = torch.empty_like(weight), [], []
    if form.bits == 8:
        scale, zero = rules.int8_scale(*rules.extremes(weight, clip)), weight.new_zeros(rows, 1)
        floor, ceiling = -127, 127
    for start in range(0, width, block):
        stop = min(start + block, width)
        part = rest[:, start:stop]
        if form.bits == 4:
            ratio = None if clip is None else clip[:, start // block]
            scale, zero = rules.int4_scale(*rules.extremes(part, ratio), form.symmetric)
            floor, ceiling = 0, 15
        lost = torch.empty_like(part)
        for j in range(stop - start):
            row = factor[start + j, start:stop]
            column = part[:, j : j + 1]
            code = ((column / scale).round() + zero).clamp(floor, ceiling)
            codes[:, start + j] = code[:, 0]
            lost[:, j : j + 1] = (column - (code - zero) * scale) / row[j]
            part[:, j + 1 :] -= lost[:, j : j + 1] * row[j + 1 :]
        rest[:, stop:] -= lost @ factor[start:stop, stop:]
        scales.append(scale)
        zeros.append(zero)
    if form.bits == 8:
        return PackedWeight(codes.to(torch.int8), scales[0][:, 0], None, (rows, width), 8, 0)
    return PackedWeight(
        pack_nibbles(codes.to(torch.uint8)),
        torch.cat(scales, 1).half(),
        None if form.symmetric else torch.cat(zeros, 1).to(torch.uint8),
        (rows, width),
        4,
        form.group,
    )


def _clip(weight: Tensor, form: Format, importance: Tensor | None) -> Tensor | None:
    if not form.clip_search:
        return None
    return search_clip(weight, form.bits, form.group, form.symmetric, importance)


def _inverse_factor(moment: Tensor, ridge: float) -> Tensor:
    """Return upper triangular U, float32, with U^T U the inverse of the damped moment."""
    moment = moment.double()
    mean = moment.diagonal().mean().clamp_min(1e-30)
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(moment + ridge * mean * identity)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        ridge *= 10
