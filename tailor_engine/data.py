"""Documents -> four splits, made once -> packed rows of tokens with labels.

Nothing here reads the disk (`io/text.py` does). A split is decided by the hash of a document's own
text, so the same document lands in the same split whatever came before or after it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tailor_engine.documents import Document, prompt_ids, tokenize
from tailor_engine.errors import UserError
from tailor_engine.rows import Rows, pack

__all__ = ["EMBEDDED_FRACTIONS", "FRACTIONS", "SPLITS", "Corpus", "Data", "Document", "Rows"]

SPLITS = ("train", "calibration", "validation", "test")
FRACTIONS: Mapping[str, float] = {
    "train": 0.8,
    "calibration": 0.08,
    "validation": 0.04,
    "test": 0.08,
}
# The embedded corpora are small: repair in closed form overfits below some 65,000 calibration
# tokens, and 16,000 test tokens keep the standard error of a perplexity ratio near 1 %.
EMBEDDED_FRACTIONS: Mapping[str, float] = {
    "train": 0.5,
    "calibration": 0.34,
    "validation": 0.06,
    "test": 0.1,
}


@dataclass
class Corpus:
    """Documents split once; no document, nor an exact copy of it, is in two splits.

    `splits` hold each split's documents ordered by hash, so that the input's order has no effect.
    """

    name: str
    splits: dict[str, list[Document]]
    duplicates_removed: int = 0  # exact copies, within and across splits
    duplicates_across_splits: int = 0  # those of them that separate files shared
    empty_removed: int = 0  # documents without any text
    recipe: dict[str, Any] = field(default_factory=dict)  # where the text came from

    @classmethod
    def from_documents(
        cls,
        name: str,
        documents: Iterable[Document],
        fractions: Mapping[str, float] = FRACTIONS,
    ) -> Corpus:
        """Split one pool of documents by their hashes.

        Raises: UserError where there are none, or the fractions do not add up to 1.
        """
        return cls.from_splits(name, {"train": documents}, fractions)

    @classmethod
    def from_splits(
        cls,
        name: str,
        pools: Mapping[str, Iterable[Document]],
        fractions: Mapping[str, float] = FRACTIONS,
    ) -> Corpus:
        """Take given splits as they are, and carve the missing ones out of "train" by hash.

        A text that occurs in several pools stays where it is held out: in test, else validation,
        else calibration, else train.

        Raises: UserError for an unknown split, an empty data set, or fractions that do not fit.
        """
        _check(name, pools, fractions)
        owners: dict[str, tuple[str, Document]] = {}
        removed = across = empty = 0
        for split in reversed(SPLITS):
            for document in pools.get(split, ()):
                if not document.text.strip():
                    empty += 1
                    continue
                sha256 = document.sha256
                if sha256 in owners:
                    removed += 1
                    across += owners[sha256][0] != split
                else:
                    owners[sha256] = (split, document)
        if not owners:
            raise UserError(f"data set {name!r} is empty: no document with any text in it")
        missing = [split for split in SPLITS if split not in pools]
        shares = {split: fractions.get(split, 0.0) for split in [*missing, "train"]}
        splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
        for sha256, (split, document) in sorted(owners.items(), key=lambda item: item[0]):
            splits[_place(sha256, shares) if split == "train" else split].append(document)
        return cls(name, splits, removed, across, empty)

    def rows(
        self, split: str, tokenizer: Any, length: int, limit: int | None = None, seed: int = 0
    ) -> Rows:
        """Pack a split's documents into rows of `length` tokens; at most `limit` rows.

        Documents are taken in an order that depends on the seed alone and are tokenized only as
        far as `limit` needs. Fewer rows than `limit` come back where the split holds no more.

        Raises: UserError where the split holds less text than one row.
        """
        if length < 2 or (limit is not None and limit < 1):
            raise UserError(f"rows need length >= 2 and limit >= 1, got {length} and {limit}")
        if split not in self.splits:
            raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        documents = list(self.splits[split])
        random.Random(seed).shuffle(documents)
        # Packing leaves a few holes; a little more text than the rows hold fills them.
        enough = None if limit is None else int(limit * length * 1.05) + length
        tokenized = tokenize(documents, tokenizer, enough)
        total = sum(len(tokens.ids) for tokens in tokenized)
        if total < length:
            raise UserError(
                f"split {split!r} of data set {self.name!r} holds {total} tokens in "
                f"{len(documents)} documents, less than one sequence of {length}: give more text, "
                f"a separate file for this split, or a sequence length of at most {max(total, 2)}"
            )
        return pack(tokenized, length, limit, fill=_fill_id(tokenizer))

    def prompts(
        self, split: str, tokenizer: Any, count: int, seed: int = 0
    ) -> list[tuple[str, list[int]]]:
        """Give `count` prompts as (text to read, token ids): questions where there are any.

        The ids carry the chat template, the text does not. A conversation's prompt is all before
        its last answer; a plain text's its first 32 tokens.
        """
        documents = list(self.splits[split])
        random.Random(seed).shuffle(documents)
        documents.sort(
            key=lambda document: document.answer_start is None
        )  # stable: questions first
        found = []
        for document in documents[:count]:
            ids = prompt_ids(document, tokenizer)
            question = document.text[: document.answer_start or 0].strip()
            found.append((question or tokenizer.decode(ids, skip_special_tokens=True), ids))
        return found

    @property
    def hashes(self) -> dict[str, str]:
        """Hash each split's set of documents, whatever their order."""
        return {split: _hash_of_hashes(documents) for split, documents in self.splits.items()}

    def manifest(self) -> dict[str, Any]:
        """Give what a run records of its data: per split the documents, characters and one hash."""
        return {
            "name": self.name,
            "duplicates_removed": self.duplicates_removed,
            "duplicates_across_splits": self.duplicates_across_splits,
            "empty_removed": self.empty_removed,
            "recipe": self.recipe,
            "splits": {
                split: {
                    "documents": len(documents),
                    "characters": sum(len(document.text) for document in documents),
                    "sha256": self.hashes[split],
                }
                for split, documents in self.splits.items()
            },
        }


@dataclass
class Data:
    """What a stage learns from: the domain's text, and general text where there is any."""

    domain: Corpus
    general: Corpus | None = None

    def mixed(
        self,
        split: str,
        tokenizer: Any,
        length: int,
        count: int,
        domain_weight: float = 0.5,
        seed: int = 0,
        repeat: bool = False,
    ) -> Rows:
        """`count` rows, a share `domain_weight` of them from the domain, interleaved evenly.

        Any leading part of the rows holds nearly the same share. Where a corpus has too few rows,
        `repeat` takes them again in a fresh order; without it fewer rows come back, both corpora
        cut alike so that the share holds.

        Raises: UserError where the weight is outside 0 to 1 or general text is asked for but
            missing.
        """
        if not 0.0 <= domain_weight <= 1.0 or count < 1:
            raise UserError(
                f"domain_weight must be 0 to 1 and count >= 1, got {domain_weight} and {count}"
            )
        if self.general is None and domain_weight == 0.0:
            raise UserError("domain_weight 0 asks for general text alone, but none was given")
        share = 1.0 if self.general is None else domain_weight
        wanted = {True: round(count * share), False: count - round(count * share)}
        parts: dict[bool, Rows] = {}
        for is_domain, corpus in ((True, self.domain), (False, self.general)):
            if corpus is not None and wanted[is_domain]:
                rows = corpus.rows(split, tokenizer, length, wanted[is_domain], seed)
                parts[is_domain] = rows.repeated(wanted[is_domain], seed) if repeat else rows
        scale = min(len(rows) / wanted[key] for key, rows in parts.items())
        kept = {key: parts[key][: max(1, int(wanted[key] * scale))] for key in parts}
        return _interleave(list(kept.values()))

    def manifest(self) -> dict[str, Any]:
        """Give both corpora's manifests."""
        general = self.general.manifest() if self.general is not None else None
        return {"domain": self.domain.manifest(), "general": general}


def _interleave(parts: list[Rows]) -> Rows:
    """Merge row sets so that each advances at its own steady pace."""
    joined = Rows.concat(parts)
    keys = [
        ((index + 0.5) / len(rows), number)
        for number, rows in enumerate(parts)
        for index in range(len(rows))
    ]
    return joined[sorted(range(len(joined)), key=keys.__getitem__)]


def _place(sha256: str, shares: Mapping[str, float]) -> str:
    """Find the split whose interval of [0, 1) holds the hash, held-out splits first."""
    point = int(sha256[:13], 16) / 16**13 * sum(shares.values())
    for split in reversed(SPLITS):
        point -= shares.get(split, 0.0)
        if point < 0.0:
            return split
    return "train"


def _hash_of_hashes(documents: Iterable[Document]) -> str:
    joined = "\n".join(sorted(document.sha256 for document in documents))
    return hashlib.sha256(joined.encode()).hexdigest()


def _fill_id(tokenizer: Any) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def _check(name: str, pools: Mapping[str, Any], fractions: Mapping[str, float]) -> None:
    for split in [*pools, *fractions]:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if min(fractions.values()) < 0.0 or abs(sum(fractions.values()) - 1.0) > 1e-6:
        raise UserError(f"split fractions must be >= 0 and add up to 1, got {dict(fractions)}")
    if "train" not in pools and set(pools) != set(SPLITS):
        missing = [split for split in SPLITS if split not in pools]
        raise UserError(f"data set {name!r} lacks {', '.join(missing)}, and has no train to cut")
