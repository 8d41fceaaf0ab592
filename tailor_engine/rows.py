"""Token rows: several documents packed into each, with labels and exact byte counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tailor_engine.documents import IGNORED, Tokens

# Rows that may still be filled: 94 % of positions hold text with short documents (python-docs),
# 99 % with long ones; 4 rows 92 and 98 %, 64 rows 95 and 99 %, with more documents spread wide.
OPEN_ROWS = 16


@dataclass
class Rows:
    """Packed token rows.

    Pass `input_ids` and `position_ids` to a transformers model without an attention mask and with
    `use_cache=False`: where positions restart, it masks attention between documents by itself.

    Shapes: all [N, L] int64.
    Numbers: `labels[:, t]` is the token to predict FROM position t (already shifted), or -100;
        `position_ids` restart at 0 with each document or part of one; `label_bytes` are the UTF-8
        bytes that a label stands for; `documents` numbers the text at a position, -1 on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    label_bytes: Tensor
    documents: Tensor

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
    def valid(self) -> Tensor:
        """True where there is text, False on padding, [N, L] bool."""
        return self.documents >= 0

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

    def hold_out(self, count: int) -> tuple[Rows, Rows]:
        """Split off the last `count` rows, without any text of a document that the others hold.

        Such text becomes padding in the rows held out: judged by rows of the documents that it was
        fitted to, a repair looks up to 4 % better than it is, and 8 % on general text. Where
        nothing would be left (one long document), the rows stay as they are.
        """
        rest, held = self[: len(self) - count], self[len(self) - count :]
        shared = torch.isin(held.documents, rest.documents.unique())
        if bool((shared | ~held.valid).all()):
            return rest, held
        held = replace(
            held,
            labels=held.labels.masked_fill(shared, IGNORED),
            label_bytes=held.label_bytes.masked_fill(shared, 0),
            documents=held.documents.masked_fill(shared, -1),
        )
        return rest, held

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
        return (self.input_ids, self.position_ids, self.labels, self.label_bytes, self.documents)


def pack(documents: Sequence[Tokens], length: int, limit: int | None, fill: int) -> Rows:
    """Lay documents into rows of `length`, padding with `fill` what stays empty.

    A document that fits into a row is never cut: it goes where it leaves the least room of the
    last `OPEN_ROWS` rows, else into a new one. One that is too long is cut anyway, so its first
    part fills the largest hole of at least a quarter row. So rows keep the documents' order up to
    `OPEN_ROWS` places. Everything gets a place unless `limit` cuts the rows.
    """
    rows: list[list[tuple[Tokens, slice]]] = []
    free: list[int] = []
    for document in documents:
        begin, total = 0, len(document.ids)
        while begin < total:
            row = _place(free, total - begin, length)
            if row == len(rows):
                if row == limit:
                    break
                rows.append([])
                free.append(length)
            end = min(total, begin + free[row])
            rows[row].append((document, slice(begin, end)))
            free[row] -= end - begin
            begin = end
    input_ids = np.full((len(rows), length), fill, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    label_bytes = np.zeros((len(rows), length), dtype=np.int64)
    numbers = np.full((len(rows), length), -1, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    for index, parts in enumerate(rows):
        at = 0
        for document, part in parts:
            here = (index, slice(at, at + part.stop - part.start))
            input_ids[here] = document.ids[part]
            labels[here] = document.labels[part]
            label_bytes[here] = document.label_bytes[part]
            numbers[here] = document.number
            positions[here] = np.arange(part.stop - part.start)
            at += part.stop - part.start
        positions[index, at:] = np.arange(length - at)
    arrays = (input_ids, positions, labels, label_bytes, numbers)
    return Rows(*map(torch.from_numpy, arrays))


def _place(free: Sequence[int], size: int, length: int) -> int:
    """Choose the row for `size` tokens; `len(free)` stands for a new one."""
    recent = range(max(0, len(free) - OPEN_ROWS), len(free))
    if size > length:
        largest = max(recent, key=free.__getitem__, default=len(free))
        return largest if largest < len(free) and 4 * free[largest] >= length else len(free)
    fitting = (row for row in recent if free[row] >= size)
    return min(fitting, key=free.__getitem__, default=len(free))
