"""The loss on pieces of text, which compares models whatever their tokenizers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine.data import Document
from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages._precision import autocast

BATCH_TOKENS = 2048  # of a forward pass
HEAD_CHUNK = 512  # tokens whose logits exist at once


def pieces(
    documents: Iterable[Document], tokenizer: Any, count: int, length: int = 256, seed: int = 0
) -> list[str]:
    """Cut documents, taken in random order, into `count` texts of `length` tokens each.

    The last piece of a longer document is dropped where it is shorter than half of that. Fewer
    texts come back where there is no more.

    Raises:
        UserError: no document with any text.
    """
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    found: list[str] = []
    for document in documents:
        offsets = tokenizer(
            document.text, return_offsets_mapping=True, add_special_tokens=False
        ).offset_mapping
        for start in range(0, len(offsets), length):
            part = offsets[start : start + length]
            if part and (start == 0 or len(part) >= length // 2):
                found.append(document.text[part[0][0] : part[-1][1]])
        if len(found) >= count:
            break
    if not found:
        raise UserError(f"no text among the {len(documents)} documents of a split")
    return found[:count]


@torch.inference_mode()
def losses(model: Model, texts: Sequence[str], precision: str = "auto") -> tuple[Tensor, Tensor]:
    """Return every text's summed loss in nats, and its number of tokens, both float64 [N].

    One special token stands in front of each text, so that all of its own tokens are predicted.
    """
    tokenizer, body = model.tokenizer, model.family.body_of(model.network)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids
    totals = torch.zeros(len(encoded), dtype=torch.float64)
    # Texts of like length go together: padding is computed and thrown away.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    for rows in _batches(order, encoded):
        ids = torch.full((len(rows), 1 + len(encoded[rows[0]])), first or 0)
        for row, i in enumerate(rows):
            ids[row, 1 : 1 + len(encoded[i])] = torch.tensor(encoded[i])
        ids = ids.to(model.device)
        with autocast(model.device, precision):
            # Padding stands behind the text, where causal attention does not look.
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        for row, i in enumerate(rows):
            count = len(encoded[i])
            totals[i] = _nats(model, hidden[row, :count].float(), ids[row, 1 : 1 + count])
    return totals, torch.tensor([len(tokens) for tokens in encoded], dtype=torch.float64)


def _batches(order: Sequence[int], encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Group texts, given from the longest to the shortest, by BATCH_TOKENS with their padding."""
    rows: list[int] = []
    for i in order:
        if rows and (len(rows) + 1) * len(encoded[rows[0]]) > BATCH_TOKENS:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def _nats(model: Model, states: Tensor, target: Tensor) -> Tensor:
    head = model.family.head_of(model.network)
    softcap = model.family.softcap(model.config)
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for part, labels in zip(states.split(HEAD_CHUNK), target.split(HEAD_CHUNK), strict=True):
        logits = head(part.to(model.network.dtype)).float()
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
    return total
