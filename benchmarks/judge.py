"""Judge a smaller model by the same pieces of text as the dense one, whatever their tokenizers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from tailor_engine.stages._precision import autocast
from tailor_engine.stages.evaluate import logits

BATCH = 8  # pieces a forward pass
HEAD_CHUNK = 256  # tokens whose logits exist at once


@dataclass(frozen=True)
class Ratio:
    """Perplexity over the dense model's, a dense token; the error is that of paired pieces."""

    value: float
    stderr: float


def pieces(documents, tokenizer, count, length=256, seed=0):
    """Cut documents, taken in random order, into `count` texts of `length` tokens each.

    The last piece of a document is dropped where it is shorter than half of that.
    """
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    found = []
    for document in documents:
        offsets = tokenizer(
            document.text, return_offsets_mapping=True, add_special_tokens=False
        ).offset_mapping
        for start in range(0, len(offsets), length):
            part = offsets[start : start + length]
            if len(part) >= length // 2:
                found.append(document.text[part[0][0] : part[-1][1]])
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"{len(found)} pieces of {length} tokens instead of {count}: more text needed")


@torch.inference_mode()
def losses(model, texts):
    """Return every text's summed loss in nats, and its number of tokens, both float64 [N].

    One special token in front of each text, so that all of its own tokens are predicted.
    """
    tokenizer = model.tokenizer
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    body, totals, counts = model.family.body_of(model.network), [], []
    for begin in range(0, len(texts), BATCH):
        encoded = tokenizer(texts[begin : begin + BATCH], add_special_tokens=False).input_ids
        width = max(map(len, encoded))
        ids = torch.full((len(encoded), width + 1), first)
        for row, tokens in enumerate(encoded):
            ids[row, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        ids = ids.to(model.device)
        with autocast(model.device, "auto"):
            # Padding stands behind the text, where causal attention does not look.
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        for row, tokens in enumerate(encoded):
            states, target = hidden[row, : len(tokens)].float(), ids[row, 1 : 1 + len(tokens)]
            totals.append(sum(_nats(model, *part) for part in _chunks(states, target)))
            counts.append(len(tokens))
    return torch.tensor(totals, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)


def ratio(dense, smaller):
    """Compare two results of `losses` on the same texts."""
    (dense_loss, tokens), (loss, _) = dense, smaller
    rise = (loss - dense_loss).sum() / tokens.sum()
    residual = loss - dense_loss - rise * tokens
    error = residual.std() * math.sqrt(len(tokens)) / tokens.sum()
    value = math.exp(rise)
    return Ratio(value, value * error.item())


def _chunks(states, target):
    return zip(states.split(HEAD_CHUNK), target.split(HEAD_CHUNK), strict=True)


def _nats(model, states, target):
    return torch.nn.functional.cross_entropy(
        logits(model, states).float(), target, reduction="sum"
    ).item()
