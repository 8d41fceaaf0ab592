"""Vocabulary: fewer tokens, those that the text uses most; embedding, head and tokenizer follow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tailor_engine.data import Corpus, Data
from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages._stage import Report, context, option, stage
from tailor_engine.stages._vocabulary import Trimming

JUDGED_SPLIT = "validation"


@dataclass(frozen=True)
class VocabularyConfig:
    """How many tokens stay, and which text decides."""

    share: float = option(0.5, "share of the tokens to keep", low=0.001, high=1)
    tokens: int = option(0, "tokens to keep; above 0 it replaces share", low=0)
    rounding: int = option(
        64, "the number kept, if not all, is a multiple of this", choices=(1, 32, 64, 128)
    )
    domain_weight: float = option(0.5, "share of the domain's use in a token's", low=0, high=1)
    rows: int = option(4096, "sequences of each corpus that are counted", low=1)
    sequence_length: int = option(256, "tokens a sequence", low=8)
    seed: int = option(0, "of the choice of rows", low=0)


@stage(VocabularyConfig)
def vocabulary(model: Model, config: VocabularyConfig, data: Data) -> tuple[Model, Report]:
    """Keep the most used tokens; rebuild the tokenizer, and slice embedding and head to match."""
    trimming = Trimming(
        model, data, config.domain_weight, config.rows, config.sequence_length, config.seed
    )
    known = len(trimming.known)
    if config.tokens > known:
        raise UserError(f"vocabulary: tokens must be <= {known}, got {config.tokens}")
    size = trimming.rounded(config.tokens or config.share * known, config.rounding)
    cut = trimming.cut(size)
    metrics: dict[str, Any] = {"tokens_before": known, "tokens_after": size}
    for name, corpus in (("domain", data.domain), ("general", data.general)):
        if corpus is not None and corpus.splits[JUDGED_SPLIT]:
            for when, by in (("before", model.tokenizer), ("after", cut.tokenizer)):
                key = f"{name}_tokens_per_character_{when}"
                metrics[key] = tokens_per_character(corpus, by)
    context().note(
        "other tokens are counted now: compare bits_per_byte, not perplexity, with earlier stages"
    )
    return cut, Report("vocabulary", dataclasses.asdict(config), metrics=metrics)


def tokens_per_character(corpus: Corpus, tokenizer: Any, split: str = JUDGED_SPLIT) -> float:
    """Return how many tokens a character of a split's documents takes."""
    texts = [document.text for document in corpus.splits[split]]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return sum(map(len, encoded)) / max(1, sum(map(len, texts)))
