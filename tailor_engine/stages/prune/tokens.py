"""What a smaller vocabulary costs: the loss on text that is written in its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.interpolate import PchipInterpolator

from tailor_engine.data import Data
from tailor_engine.stages._stage import context
from tailor_engine.stages._text_loss import losses, pieces
from tailor_engine.stages._vocabulary import Trimming

SHARES = (0.7, 0.5, 0.35, 0.25)  # of the tokens, that are measured
STEP = 0.025  # between the sizes that may be chosen, as a share of the tokens
TEXTS = 48  # of each corpus: a rise of 0.03 nats has a standard error of 0.008
ENOUGH = 0.5  # nats: a rise above which nothing smaller is tried


def foretell(trimming: Trimming, data: Data, config: Any) -> list[tuple[int, float]]:
    """Return sizes that the vocabulary may have, and the loss rise of each in nats a dense token.

    A few sizes are measured, for there is no short way to what a text loses that is written in
    other tokens; between them the rise is interpolated (PCHIP, which keeps it monotone).
    """
    model = trimming.model
    share = 1.0 if data.general is None else config.domain_weight
    judged = []
    for corpus, weight in ((data.domain, share), (data.general, 1 - share)):
        if corpus is not None and weight:
            texts = pieces(corpus.splits["calibration"], model.tokenizer, TEXTS, seed=config.seed)
            judged.append((texts, weight, losses(model, texts, config.precision)))
    known, whole = len(trimming.known), len(model.family.embedding_of(model.network).weight)
    measured = {whole: 0.0}
    for done, part in enumerate(SHARES):
        tokens = trimming.rounded(part * known, config.rounding)
        if tokens < len(trimming.required) or measured[min(measured)] > ENOUGH:
            break
        smaller = trimming.cut(tokens)
        rise = torch.zeros((), dtype=torch.float64)
        for texts, weight, (dense, counts) in judged:
            loss, _ = losses(smaller, texts, config.precision)
            rise += weight * (loss - dense).sum() / counts.sum()
        measured[tokens] = float(rise)
        context().progress(done + 1, len(SHARES), "smaller vocabularies")
    return _between(trimming, measured, config.rounding)


def _between(
    trimming: Trimming, measured: Mapping[int, float], rounding: int
) -> list[tuple[int, float]]:
    """Return all sizes from the largest to the smallest that was measured, with their rises."""
    if len(measured) == 1:
        return list(measured.items())
    sizes = sorted(measured)
    rises = PchipInterpolator(sizes, [measured[size] for size in sizes])
    steps = range(1, math.ceil(1 / STEP))
    offered = {trimming.rounded(len(trimming.known) * STEP * step, rounding) for step in steps}
    offered = {size for size in offered if sizes[0] <= size < sizes[-1]} | set(measured)
    return [(size, float(rises(size))) for size in sorted(offered, reverse=True)]
