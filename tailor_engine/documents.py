"""Documents, and the tokens, labels and bytes that a tokenizer makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from tailor_engine.errors import UserError

IGNORED = -100  # label of a position that carries no loss, as in torch's cross_entropy


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


@dataclass(frozen=True)
class Tokens:
    """A tokenized document.

    Shapes: all [T] int64.
    Numbers: `labels[t]` is the token to predict from position t, or -100; `label_bytes[t]` its
        UTF-8 bytes; `number` is the same for equal texts only.
    """

    ids: np.ndarray
    labels: np.ndarray
    label_bytes: np.ndarray
    number: int


def tokenize(
    documents: Sequence[Document], tokenizer: Any, enough: int | None = None
) -> list[Tokens]:
    """Tokenize documents, stopping once there are `enough` tokens.

    A document begins and ends with the special tokens that the tokenizer itself puts there
    (`add_special_tokens`; Llama: BOS in front, SmolLM2: none), a conversation with those of its
    chat template; nothing else is added. Each token is the label of the position before it; the
    first one, which nothing precedes, is no label. A token carries loss when it holds any
    character of an answer.

    Raises: UserError for a tokenizer that cannot tell where its tokens stand in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
            "(tokenizer.json) is needed"
        )
    tokenized: list[Tokens] = []
    total = 0
    size = 16 if enough is not None else 256
    for start in range(0, len(documents), size):
        part = documents[start : start + size]
        for document, encoded in zip(part, _encode(part, tokenizer), strict=True):
            tokenized.append(Tokens(*_label(*encoded), int(document.sha256[:15], 16)))
            total += len(tokenized[-1].ids)
        if enough is not None and total >= enough:
            break
    return tokenized


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
