"""Fewer tokens: which of them a text needs, and a model and tokenizer that have these alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tailor_engine import ops
from tailor_engine.data import Data
from tailor_engine.errors import UserError
from tailor_engine.families import keep_tokens, token_ids
from tailor_engine.model import Model
from tailor_engine.stages._vocabulary import bpe

COUNTED_SPLIT = "train"
# What is known of tokens that the counted text lacks: low ids are early, frequent merges. This much
# of the whole count follows Zipf's law over ids: text of neither corpus (a licence) then takes 11 %
# more tokens at a third of SmolLM2's vocabulary instead of 13 %, and the two corpora none.
PRIOR, PRIOR_FLATTENING = 0.1, 200


class Trimming:
    """The ways in which a model's vocabulary can be cut, least used tokens first."""

    def __init__(
        self,
        model: Model,
        data: Data,
        domain_weight: float,
        rows: int = 4096,
        length: int = 256,
        seed: int = 0,
    ) -> None:
        """Count the tokens of up to `rows` sequences of each corpus.

        Raises:
            UserError: the tokenizer cannot be rebuilt, or the model is quantized or wrapped.
        """
        self.model = model
        self.description = _describe(model)
        self.known = set(bpe.ids_of(self.description).values())
        rows_of_model = len(model.family.embedding_of(model.network).weight)
        if max(self.known) >= rows_of_model:
            raise UserError(
                f"vocabulary: token {max(self.known)} has no row in the embedding of "
                f"{rows_of_model}"
            )
        self.required = bpe.indispensable(self.description) | (_named(model) & self.known)
        self.parts = bpe.parts(self.description)
        self.used = _counts(model, data, domain_weight, rows, length, seed)

    def rounded(self, wanted: float, rounding: int) -> int:
        """Return the nearest number of tokens that can be kept: all, or a multiple."""
        if wanted >= len(self.known):
            return len(self.known)
        count = max(1, round(wanted / rounding)) * rounding
        return min(count, len(self.known))

    def cut(self, tokens: int) -> Model:
        """Return a copy of the model, and of its teacher, with so many tokens.

        Raises:
            UserError: the tokens without which some text cannot be written are more.
        """
        model, description = self.model, self.description
        chosen = bpe.choose(self.used, self.parts, self.required, tokens)
        kept = bpe.order(description, chosen)
        tokenizer = _with_backend(model.tokenizer, bpe.rebuilt(description, kept))
        teacher = model.teacher and _sliced(model.teacher, tokenizer, kept)
        return _sliced(model, tokenizer, kept).replace(teacher=teacher, base=model.base or model)


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
    description: dict[str, Any] = json.loads(model.tokenizer.backend_tokenizer.to_str())
    bpe.check(description)
    return description


def _named(model: Model) -> set[int]:
    """Return the ids that tokenizer and configs name, such as the end of a text."""
    named = set(model.tokenizer.all_special_ids)
    for settings in (model.config, model.network.generation_config):
        for value in token_ids(settings).values():
            named |= set(value) if isinstance(value, list) else {value}
    return named


def _counts(
    model: Model, data: Data, domain_weight: float, limit: int, sequence: int, seed: int
) -> np.ndarray:
    """Return how much of the text each id is, domain and general mixed, plus the prior [V]."""
    length = max(len(model.tokenizer), len(model.family.embedding_of(model.network).weight))
    mixed = np.zeros(length)
    share = 1.0 if data.general is None else domain_weight
    for corpus, weight in ((data.domain, share), (data.general, 1 - share)):
        if corpus is not None and weight:
            rows = corpus.rows(COUNTED_SPLIT, model.tokenizer, sequence, limit, seed)
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
def _sliced(model: Model, tokenizer: Any, kept: Sequence[int]) -> Model:
    """Return a copy of the model with these tokens' rows alone."""
    family, network = model.family, copy.deepcopy(model.network)
    weights = [family.embedding_of(network).weight.detach()]
    if not family.tied(network):
        weights.append(family.head_of(network).weight.detach())
    index = torch.tensor(kept, device=model.device)
    sliced = ops.structured_slice(weights, [index] * len(weights), [None] * len(weights))
    keep_tokens(network, kept, *sliced)
    return model.replace(network=network, tokenizer=tokenizer)
