"""Vocabulary: fewer tokens, those that the text uses most; embedding, head and tokenizer follow."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tailor_engine import ops
from tailor_engine.data import Corpus, Data
from tailor_engine.errors import UserError
from tailor_engine.families import keep_tokens, token_ids
from tailor_engine.model import Model
from tailor_engine.stages._stage import Report, context, option, stage
from tailor_engine.stages.vocabulary import bpe

COUNTED_SPLIT, JUDGED_SPLIT = "train", "validation"
# What is known of tokens that the counted text lacks: low ids are early, frequent merges. This much
# of the whole count follows Zipf's law over ids: text of neither corpus (a licence) then takes 11 %
# more tokens at a third of SmolLM2's vocabulary instead of 13 %, and the two corpora none.
PRIOR, PRIOR_FLATTENING = 0.1, 200


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
    description = _describe(model)
    known = set(bpe.ids_of(description).values())
    size = _size(model, config, known)
    required = bpe.indispensable(description) | (_named(model) & known)
    used = _counts(model, config, data)
    kept = bpe.order(description, bpe.choose(used, bpe.parts(description), required, size))
    tokenizer = _with_backend(model.tokenizer, bpe.rebuilt(description, kept))
    metrics: dict[str, Any] = {"tokens_before": len(known), "tokens_after": len(kept)}
    for name, corpus in (("domain", data.domain), ("general", data.general)):
        if corpus is not None and corpus.splits[JUDGED_SPLIT]:
            for when, by in (("before", model.tokenizer), ("after", tokenizer)):
                key = f"{name}_tokens_per_character_{when}"
                metrics[key] = tokens_per_character(corpus, by)
    context().note(
        "other tokens are counted now: compare bits_per_byte, not perplexity, with earlier stages"
    )
    teacher = model.teacher and _cut(model.teacher, tokenizer, kept)
    cut = _cut(model, tokenizer, kept).replace(teacher=teacher, base=model.base or model)
    return cut, Report("vocabulary", dataclasses.asdict(config), metrics=metrics)


def tokens_per_character(corpus: Corpus, tokenizer: Any, split: str = JUDGED_SPLIT) -> float:
    """Return how many tokens a character of a split's documents takes."""
    texts = [document.text for document in corpus.splits[split]]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return sum(map(len, encoded)) / max(1, sum(map(len, texts)))


def _describe(model: Model) -> dict[str, Any]:
    """Return the tokenizer's own description, where it and the model can be cut."""
    for what in ("embedding", "head"):
        module = model.network.get_submodule(getattr(model.family, what))
        if not isinstance(getattr(module, "weight", None), torch.Tensor):
            raise UserError(
                f"vocabulary: the {what} is a {type(module).__name__}; cut the vocabulary before "
                "the model is quantized or wrapped"
            )
    if not getattr(model.tokenizer, "is_fast", False):
        raise UserError(
            f"vocabulary: {type(model.tokenizer).__name__} is no fast tokenizer (tokenizer.json)"
        )
    description = json.loads(model.tokenizer.backend_tokenizer.to_str())
    bpe.check(description)
    return description


def _size(model: Model, config: VocabularyConfig, known: set[int]) -> int:
    """Return how many tokens stay."""
    rows = len(model.family.embedding_of(model.network).weight)
    if max(known) >= rows:
        raise UserError(f"vocabulary: token {max(known)} has no row in the embedding of {rows}")
    if config.tokens > len(known):
        raise UserError(f"vocabulary: tokens must be <= {len(known)}, got {config.tokens}")
    wanted = config.tokens or config.share * len(known)
    if wanted == len(known):
        return len(known)
    return min(max(1, round(wanted / config.rounding)) * config.rounding, len(known))


def _named(model: Model) -> set[int]:
    """Return the ids that tokenizer and configs name, such as the end of a text."""
    named = set(model.tokenizer.all_special_ids)
    for settings in (model.config, model.network.generation_config):
        for value in token_ids(settings).values():
            named |= set(value) if isinstance(value, list) else {value}
    return named


def _counts(model: Model, config: VocabularyConfig, data: Data) -> np.ndarray:
    """Return how much of the text each id is, domain and general mixed, plus the prior [V]."""
    length = max(len(model.tokenizer), len(model.family.embedding_of(model.network).weight))
    mixed = np.zeros(length)
    share = 1.0 if data.general is None else config.domain_weight
    for corpus, weight in ((data.domain, share), (data.general, 1 - share)):
        if corpus is not None and weight:
            rows = corpus.rows(
                COUNTED_SPLIT, model.tokenizer, config.sequence_length, config.rows, config.seed
            )
            seen = torch.bincount(rows.input_ids[rows.valid], minlength=length)
            mixed += weight * (seen / seen.sum()).numpy()
    zipf = 1 / (np.arange(length) + PRIOR_FLATTENING)
    return mixed + PRIOR * zipf / zipf.sum()


def _with_backend(tokenizer: Any, description: dict[str, Any]) -> Any:
    """Return a tokenizer like this one (template, special tokens) with another vocabulary."""
    changed = copy.deepcopy(tokenizer)
    changed._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(description))
    changed.init_kwargs.pop("added_tokens_decoder", None)  # the old ids
    return changed


@torch.no_grad()
def _cut(model: Model, tokenizer: Any, kept: Sequence[int]) -> Model:
    """Return a copy of the model with these tokens' rows alone."""
    family, network = model.family, copy.deepcopy(model.network)
    weights = [family.embedding_of(network).weight.detach()]
    if not family.tied(network):
        weights.append(family.head_of(network).weight.detach())
    index = torch.tensor(kept, device=model.device)
    sliced = ops.structured_slice(weights, [index] * len(weights), [None] * len(weights))
    keep_tokens(network, kept, *sliced)
    return model.replace(network=network, tokenizer=tokenizer)
