"""The loss on pieces of text, which compares models whatever their tokenizers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine.data import Document
from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages._precision import autocast

BATCH = 8  # pieces a forward pass
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
    totals, counts = [], []
    for begin in range(0, len(texts), BATCH):
        encoded = tokenizer(list(texts[begin : begin + BATCH]), add_special_tokens=False).input_ids
        ids = torch.full((len(encoded), 1 + max(map(len, encoded))), first or 0)
        for row, tokens in enumerate(encoded):
            ids[row, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        ids = ids.to(model.device)
        with autocast(model.device, precision):
            # Padding stands behind the text, where causal attention does not look.
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        for row, tokens in enumerate(encoded):
            target = ids[row, 1 : 1 + len(tokens)]
            totals.append(_nats(model, hidden[row, : len(tokens)].float(), target))
            counts.append(len(tokens))
    return torch.stack(totals).cpu(), torch.tensor(counts, dtype=torch.float64)


def _nats(model: Model, states: Tensor, target: Tensor) -> Tensor:
    head = model.family.head_of(model.network)
    softcap = model.family.softcap(model.config)
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for part, labels in zip(states.split(HEAD_CHUNK), target.split(HEAD_CHUNK), strict=True):
        logits = head(part.to(model.network.dtype)).float()
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
    return total
