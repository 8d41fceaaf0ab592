"""Documents -> token rows: several packed into each, with labels and exact byte counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from tailor_engine.errors import UserError

IGNORED = -100  # label of a position that carries no loss, as in torch's cross_entropy
OPEN_ROWS = 32  # rows that may still be filled; 96 % of positions hold tokens (8: 93, all: 97)


@dataclass(frozen=True)
class Document:
    """One text; the unit that is split, hashed and never attended across.

    A plain document carries loss on all its text, or from character `answer_start` on. With
    `messages` (role, content) the text is rendered by the tokenizer's chat template when rows are
    made, and only what the assistant says carries loss; `text` and `answer_start` then serve for
    hashing and for tokenizers without a template.
    """

    text: str
    answer_start: int | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    @classmethod
    def from_messages(cls, messages: Iterable[tuple[str, str]]) -> Document:
        """Make a conversation; its plain text puts a blank line between turns."""
        turns = tuple(messages)
        before = "".join(content + "\n\n" for _, content in turns[:-1])
        return cls(before + turns[-1][1], len(before), turns)

    @property
    def sha256(self) -> str:
        """Hash the text, in hexadecimal; it decides the split."""
        return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()


@dataclass
class Rows:
    """Packed token rows.

    Pass `input_ids` and `position_ids` to a transformers model without an attention mask and with
    `use_cache=False`: where positions restart, it masks attention between documents by itself.

    Shapes: all [N, L] int64 (`valid` bool) but `label_bytes` [N] int64.
    Numbers: `labels[:, t]` is the token to predict FROM position t (already shifted), or -100;
        `position_ids` restart at 0 with each document or chunk of one; `valid` is False on
        padding; `label_bytes` are the UTF-8 bytes that a row's labelled tokens stand for.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    valid: Tensor
    label_bytes: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Rows:
        """Take a subset as rows; one integer gives one row."""
        if isinstance(index, int):
            index = [index]
        return Rows(*(tensor[index] for tensor in self._tensors()))

    def __iter__(self) -> Iterator[Rows]:
        return (self[i] for i in range(len(self)))

    @property
    def mask(self) -> Tensor:
        """True where a position carries loss, [N, L] bool."""
        return self.labels != IGNORED

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.valid.sum())

    @property
    def target_tokens(self) -> int:
        """Labelled tokens: what a mean loss is the mean over."""
        return int(self.mask.sum())

    @property
    def target_bytes(self) -> int:
        """UTF-8 bytes of all labelled tokens; bits per byte = summed loss / ln 2 / this."""
        return int(self.label_bytes.sum())

    def batches(
        self, batch_size: int, shuffle_seed: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Dicts of `input_ids`, `position_ids`, `labels`, `valid`; the last may be smaller."""
        order = torch.arange(len(self))
        if shuffle_seed is not None:
            generator = torch.Generator().manual_seed(shuffle_seed)
            order = torch.randperm(len(self), generator=generator)
        for part in order.split(batch_size):
            yield {
                "input_ids": self.input_ids[part],
                "position_ids": self.position_ids[part],
                "labels": self.labels[part],
                "valid": self.valid[part],
            }

    def repeated(self, count: int, seed: int) -> Rows:
        """`count` rows: all of these once, then again in fresh orders until there are enough."""
        order = list(range(min(count, len(self))))
        generator = torch.Generator().manual_seed(seed)
        while len(order) < count:
            order += torch.randperm(len(self), generator=generator).tolist()
        return self[order[:count]]

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """All rows one after another; they must be of one length."""
        if len({part.input_ids.shape[1] for part in parts}) != 1:
            lengths = [part.input_ids.shape[1] for part in parts]
            raise ValueError(f"rows must be of one length to be joined, got {lengths}")
        return Rows(
            *(torch.cat(group) for group in zip(*(p._tensors() for p in parts), strict=True))
        )

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.input_ids, self.position_ids, self.labels, self.valid, self.label_bytes)


@dataclass(frozen=True)
class Piece:
    """A document, or a chunk of a long one: token ids, the label at each, the labels' bytes."""

    ids: np.ndarray
    labels: np.ndarray
    label_bytes: int


def tokenize(
    documents: Sequence[Document], tokenizer: Any, length: int, enough: int | None = None
) -> list[Piece]:
    """Tokenize documents into pieces of at most `length` tokens, stopping after `enough` tokens.

    A document begins and ends with the special tokens that the tokenizer itself puts there
    (`add_special_tokens`; Llama: BOS in front, SmolLM2: none), a conversation with those of its
    chat template; nothing else is added. Each token of a document is the label of exactly one
    position, save the first, which nothing precedes: the last position of a chunk predicts the
    first token of the next. A token carries loss when it holds any character of an answer.

    Raises: UserError for a tokenizer that cannot tell where its tokens stand in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
            "(tokenizer.json) is needed"
        )
    pieces: list[Piece] = []
    total = 0
    size = 16 if enough is not None else 256
    for start in range(0, len(documents), size):
        for encoded in _encode(documents[start : start + size], tokenizer):
            ids, labels, sizes = _label(*encoded)
            for begin in range(0, len(ids), length):
                part = slice(begin, begin + length)
                pieces.append(Piece(ids[part], labels[part], int(sizes[part].sum())))
            total += len(ids)
        if enough is not None and total >= enough:
            break
    return pieces


def pack(pieces: Sequence[Piece], length: int, limit: int | None, fill: int) -> Rows:
    """Lay pieces into rows, each into the fullest of the last rows that still holds it.

    Pieces are taken longest first within a window of `OPEN_ROWS` rows' worth, so rows stay in the
    documents' order up to that: the first and the last rows of a set hold different documents.
    Every piece gets a place unless `limit` cuts the rows.
    """
    starts = np.cumsum([0, *(len(piece.ids) for piece in pieces)])[:-1]
    windows = starts // (OPEN_ROWS * length)
    order = sorted(range(len(pieces)), key=lambda i: (windows[i], -len(pieces[i].ids)))
    rows: list[list[Piece]] = []
    free: list[int] = []
    for piece in (pieces[i] for i in order):
        size = len(piece.ids)
        recent = range(max(0, len(rows) - OPEN_ROWS), len(rows))
        place = min((row for row in recent if free[row] >= size), key=free.__getitem__, default=-1)
        if place < 0 and limit is not None and len(rows) == limit:
            continue
        if place < 0:
            place = len(rows)
            rows.append([])
            free.append(length)
        rows[place].append(piece)
        free[place] -= size
    input_ids = np.full((len(rows), length), fill, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    valid = np.zeros((len(rows), length), dtype=bool)
    for number, row_pieces in enumerate(rows):
        begin = 0
        for piece in row_pieces:
            end = begin + len(piece.ids)
            input_ids[number, begin:end] = piece.ids
            labels[number, begin:end] = piece.labels
            positions[number, begin:end] = np.arange(end - begin)
            begin = end
        valid[number, :begin] = True
        positions[number, begin:] = np.arange(length - begin)
    label_bytes = np.array([sum(p.label_bytes for p in row) for row in rows], dtype=np.int64)
    arrays = (input_ids, positions, labels, valid, label_bytes)
    return Rows(*map(torch.from_numpy, arrays))


def render(document: Document, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Give a document's text as the model reads it, and the character spans that carry loss.

    Raises: UserError where the chat template refuses the conversation.
    """
    if document.messages is None or not tokenizer.chat_template:
        start = -1 if document.answer_start is None else document.answer_start
        return document.text, [(start, len(document.text) + 1)]
    turns = [{"role": role, "content": content} for role, content in document.messages]
    full = _apply_template(tokenizer, turns)
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if index:
            before = _apply_template(tokenizer, turns[:index], add_generation_prompt=True)
            pairs = zip(before, full, strict=False)
            start = next((i for i, (a, b) in enumerate(pairs) if a != b), len(before))
        else:
            start = max(full.find(turn["content"]), 0)
        through = _apply_template(tokenizer, turns[: index + 1])
        if full.startswith(through):
            spans.append((start, len(through)))
        elif index == len(turns) - 1:
            spans.append((start, len(full)))
    return full, spans


def prompt_ids(document: Document, tokenizer: Any, opening: int = 32) -> list[int]:
    """Give the tokens of a document's prompt, ready to be continued by the model.

    Raises: UserError where the chat template refuses the conversation.
    """
    if document.messages is not None and tokenizer.chat_template:
        turns = [{"role": role, "content": content} for role, content in document.messages]
        while turns and turns.pop()["role"] != "assistant":
            pass
        text = _apply_template(tokenizer, turns, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if document.answer_start:
        return list(tokenizer(document.text[: document.answer_start])["input_ids"])
    return list(tokenizer(document.text)["input_ids"][:opening])


def _apply_template(tokenizer: Any, turns: list[dict[str, str]], **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"the chat template refuses the roles {roles}: {error}") from error


def _encode(
    documents: Sequence[Document], tokenizer: Any
) -> Iterator[tuple[str, list[tuple[int, int]], list[int], list[tuple[int, int]]]]:
    """Yield each document's (text, character spans with loss, token ids, token offsets)."""
    rendered = [render(document, tokenizer) for document in documents]
    chat = [d.messages is not None and bool(tokenizer.chat_template) for d in documents]
    encoded: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for is_chat in (False, True):
        chosen = [i for i, flag in enumerate(chat) if flag == is_chat]
        if chosen:
            batch = tokenizer(
                [rendered[i][0] for i in chosen],
                add_special_tokens=not is_chat,  # the template writes its own
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            pairs = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
            encoded.update(zip(chosen, pairs, strict=True))
    for i, (text, spans) in enumerate(rendered):
        yield text, spans, *encoded[i]


def _label(
    text: str, spans: Sequence[tuple[int, int]], token_ids: list[int], offsets: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, shifted labels and the UTF-8 bytes behind each label, all [T].

    A token stands for the text from the end of the one before it to its own end, so that the
    bytes of all tokens add up to the text's, even where one character is several tokens.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    ends = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
    begins = np.concatenate([[0], ends[:-1]])[: len(ends)]
    carries = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        carries |= (ends > start) & (begins < end)
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    labels[:-1] = np.where(carries[1:], ids[1:], IGNORED)
    widths = _byte_offsets(text)
    sizes = np.zeros(len(ids), dtype=np.int64)
    sizes[:-1] = np.where(carries, widths[ends] - widths[begins], 0)[1:]
    return ids, labels, sizes


def _byte_offsets(text: str) -> np.ndarray:
    """UTF-8 bytes before each character, and of the whole text at the end."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
