"""Byte-pair tokenizers as their JSON describes them: what tokens are made of, and fewer of them.

Every kept token keeps the parts that its last merge joins, recursively. So text that was one kept
token stays that token: each merge on the way to it is still there, and still the first in rank.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tailor_engine.errors import UserError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def check(description: dict[str, Any]) -> None:
    """Require a tokenizer that can be rebuilt from fewer tokens.

    Raises:
        UserError: it is no byte-pair encoding, or marks the ends of words in its tokens.
    """
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"vocabulary: the tokenizer is a {model['type']} model; only byte-pair encodings "
            "(BPE) can be rebuilt with fewer tokens"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"vocabulary: a tokenizer with {key} {model[key]!r} is not supported")


def ids_of(description: dict[str, Any]) -> dict[str, int]:
    """Return every token's id, added tokens too."""
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    return {**description["model"]["vocab"], **added}


def indispensable(description: dict[str, Any]) -> set[int]:
    """Return the ids without which some text or template could not be written.

    Added tokens, the token for the unknown, and one token for each byte or character; where
    characters fall back to bytes, the bytes and the space are enough.
    """
    model = description["model"]
    added = {token["id"] for token in description["added_tokens"]}
    if model.get("byte_fallback"):
        basic = {i for text, i in model["vocab"].items() if _BYTE.fullmatch(text) or text == SPACE}
    else:
        basic = {i for text, i in model["vocab"].items() if len(text) == 1}
    unknown = model["vocab"].get(model.get("unk_token"))
    return added | basic | ({unknown} - {None})


def parts(description: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    """Return the ids that each token of the model is made of; none for a single character."""
    vocabulary = description["model"]["vocab"]
    merges = [(left, right) for left, right in description["model"]["merges"]]
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    makers: dict[str, list[tuple[str, str]]] = {}
    for pair in ranks:
        makers.setdefault("".join(pair), []).append(pair)
    whole = {token["content"] for token in description["added_tokens"]}
    found: dict[int, tuple[int, ...]] = {}
    for text, index in vocabulary.items():
        if len(text) == 1 or text in whole or _BYTE.fullmatch(text):
            found[index] = ()
            continue
        pairs = makers.get(text, [])
        split = pairs[0] if len(pairs) == 1 else _split(text, ranks)
        known = [vocabulary.get(part) for part in split]
        # A character that the vocabulary lacks: no text ever becomes this token.
        found[index] = () if None in known else tuple(known)
    return found


def _split(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge a token's own characters, lowest rank first, and stop before the last merge."""
    pieces = list(text)
    while len(pieces) > 2:
        pairs = list(itertools.pairwise(pieces))
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[best] not in ranks:
            break
        pieces[best : best + 2] = ["".join(pairs[best])]
    return pieces


def choose(
    counts: np.ndarray, parts: dict[int, tuple[int, ...]], required: set[int], size: int
) -> set[int]:
    """Return the ids of `size` tokens: the least used go, one after another.

    A token goes only after all that are made of it, and leaves its count to its parts, which the
    text will use in its place. Of two unused tokens the one of higher id goes, a rarer merge.

    Shapes: counts [V], how often each id stands in the text.

    Raises:
        UserError: the indispensable tokens alone are more than `size`.
    """
    counts = counts.astype(np.float64)
    kept = set(parts) | required
    holders = dict.fromkeys(kept, 0)
    for index in kept:
        for part in parts.get(index, ()):
            holders[part] += 1
    free = [(counts[i], -i) for i in kept if not holders[i] and i not in required]
    heapq.heapify(free)
    while len(kept) > size:
        if not free:
            raise UserError(
                f"vocabulary: {size} tokens are too few; bytes and special tokens are {len(kept)}"
            )
        count, negative = heapq.heappop(free)
        kept.remove(-negative)
        for part in parts[-negative]:
            counts[part] += count
            holders[part] -= 1
            if not holders[part] and part not in required:
                heapq.heappush(free, (counts[part], -part))
    return kept


def order(description: dict[str, Any], kept: set[int]) -> list[int]:
    """Return kept ids in their new order: as before, those outside the model's vocabulary last."""
    inside = set(description["model"]["vocab"].values())
    return sorted(kept, key=lambda index: (index not in inside, index))


def rebuilt(description: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the description of the tokenizer that has these tokens alone, renumbered."""
    new = {old: index for index, old in enumerate(kept)}
    result = copy.deepcopy(description)
    model = result["model"]
    vocabulary = {text: new[i] for text, i in model["vocab"].items() if i in new}
    model["vocab"] = vocabulary
    model["merges"] = [
        pair
        for pair in model["merges"]
        if pair[0] in vocabulary and pair[1] in vocabulary and "".join(pair) in vocabulary
    ]
    for token in result["added_tokens"]:
        token["id"] = new[token["id"]]
    result["added_tokens"].sort(key=lambda token: token["id"])
    if result.get("padding"):
        result["padding"]["pad_id"] = new[result["padding"]["pad_id"]]
    _renumber(result.get("post_processor"), new)
    return result


def _renumber(processor: dict[str, Any] | None, new: dict[int, int]) -> None:
    """Give a post-processor's special tokens their new ids."""
    processor = processor or {}
    for inner in processor.get("processors", ()):
        _renumber(inner, new)
    tokens = processor.get("special_tokens", {})
    for token in tokens.values() if isinstance(tokens, dict) else ():
        token["ids"] = [new[i] for i in token["ids"]]
    for key in ("sep", "cls"):
        if key in processor:
            text, index = processor[key]
            processor[key] = [text, new[index]]
