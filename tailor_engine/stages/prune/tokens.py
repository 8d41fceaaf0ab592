"""What a smaller vocabulary costs: the loss on text that is written in its tokens."""

from __future__ import annotations

from typing import Any

import torch

from tailor_engine.data import Data
from tailor_engine.stages._stage import context
from tailor_engine.stages._text_loss import losses, pieces
from tailor_engine.stages._vocabulary import Trimming

SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2)  # of the tokens
TEXTS = 64  # of each corpus: a rise of 0.03 nats has a standard error of 0.007
ENOUGH = 0.5  # nats: a rise above which nothing smaller is tried


def foretell(trimming: Trimming, data: Data, config: Any) -> list[tuple[int, float]]:
    """Return sizes that the vocabulary may have, and the loss rise of each in nats a dense token.

    Measured: there is no short way to what a text loses that is written in other tokens.
    """
    model = trimming.model
    share = 1.0 if data.general is None else config.domain_weight
    judged = []
    for corpus, weight in ((data.domain, share), (data.general, 1 - share)):
        if corpus is not None and weight:
            texts = pieces(corpus.splits["calibration"], model.tokenizer, TEXTS, seed=config.seed)
            judged.append((texts, weight, losses(model, texts, config.precision)))
    known = len(trimming.known)
    found = [(len(model.family.embedding_of(model.network).weight), 0.0)]
    for done, part in enumerate(SHARES[1:]):
        tokens = trimming.rounded(part * known, config.rounding)
        if tokens < len(trimming.required) or found[-1][1] > ENOUGH:
            break
        smaller = trimming.cut(tokens)
        rise = torch.zeros((), dtype=torch.float64)
        for texts, weight, (dense, counts) in judged:
            loss, _ = losses(smaller, texts, config.precision)
            rise += weight * (loss - dense).sum() / counts.sum()
        found.append((tokens, float(rise)))
        context().progress(done + 1, len(SHARES) - 1, "smaller vocabularies")
    return found
