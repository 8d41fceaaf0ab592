"""Judge a smaller model by the same pieces of text as the dense one, whatever their tokenizers."""

import math
from dataclasses import dataclass

from tailor_engine.stages._text_loss import losses, pieces

PIECES = {"domain": 160, "general": 72}  # of up to 256 tokens: more than 16,000 tokens each


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


class Judge:
    """The held-out texts of both corpora in one split, and what the dense model makes of them."""

    def __init__(self, model, data, split):
        corpora = {"domain": data.domain, "general": data.general}
        self.texts = {
            name: pieces(corpus.splits[split], model.tokenizer, PIECES[name])
            for name, corpus in corpora.items()
        }
        self.dense = {name: losses(model, texts) for name, texts in self.texts.items()}
        self.tokens = {name: int(counts.sum()) for name, (_, counts) in self.dense.items()}

    def __call__(self, smaller):
        """Return {corpus: Ratio}."""
        return {
            name: ratio(self.dense[name], losses(smaller, texts))
            for name, texts in self.texts.items()
        }
