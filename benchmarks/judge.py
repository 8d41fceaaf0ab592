"""Judge a smaller model by the same pieces of text as the dense one, whatever their tokenizers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Perplexity over the dense model's, a dense token; the error is that of paired pieces."""

    value: float
    stderr: float


def ratio(dense, smaller):
    """Compare the (losses, tokens) of the same texts by two models."""
    (dense_loss, tokens), (loss, _) = dense, smaller
    rise = (loss - dense_loss).sum() / tokens.sum()
    residual = loss - dense_loss - rise * tokens
    value = math.exp(rise)
    return Ratio(value, value * (residual.std() * math.sqrt(len(tokens)) / tokens.sum()).item())
