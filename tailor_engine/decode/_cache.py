"""Cache layers with room for tokens to come, in the place of transformers' dynamic ones.

A dynamic layer copies all its keys and values for every token. These keep them in memory that is
larger than needed, where the native step writes; everything else (masks, cropping, beams, copies)
is transformers' own code, which sees `keys` and `values` as ever and may set them to other tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tailor_engine.decode._memory import map_pages

LEAST = 256  # tokens; beyond it the room doubles


class Count:
    """Tokens that the native step has appended to all layers of a cache, and may yet append.

    One number for all: after a step, whose weights have gone through every cache of the processor,
    each object that Python touches is a read from memory.
    """

    def __init__(self, room: int) -> None:
        self.appended, self.room = 0, room


class _Roomy:
    """Keys and values lie in `room` [2, 1, G, capacity, D], or are tensors like any others."""

    room: Tensor | None = None
    before = 0  # tokens in the room before those that `count` counts
    count = Count(0)
    _keys: Any = None
    _values: Any = None

    @property
    def keys(self) -> Any:
        """What transformers reads as the keys [1, G, S, D]."""
        return self._keys if self.room is None else self._shown(self.room[0])

    @keys.setter
    def keys(self, tensor: Any) -> None:
        self._leave()
        self._keys = tensor

    @property
    def values(self) -> Any:
        """What transformers reads as the values [1, G, S, D]."""
        return self._values if self.room is None else self._shown(self.room[1])

    @values.setter
    def values(self, tensor: Any) -> None:
        self._leave()
        self._values = tensor

    @property
    def filled(self) -> int:
        """Tokens in the room."""
        return self.before + self.count.appended

    def _leave(self) -> None:
        if self.room is not None:
            self._keys, self._values = self.keys, self.values
            self.settle(Count(0))
            self.room, self.count.room = None, 0

    def settle(self, count: Count) -> None:
        """Count further tokens anew; the old count is closed for all layers that share it."""
        self.before = self.filled
        self.count.room = 0
        self.count = count

    def _shown(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, : self.filled]

    def room_needed(self) -> tuple[int, ...]:
        """Return the shape of a room in which one more token, and as many again, can follow."""
        batch, groups, count, size = self.keys.shape
        return 2, batch, groups, max(LEAST, 2 * count), size

    def move(self, room: Tensor) -> None:
        """Copy keys and values to an empty room."""
        with torch.inference_mode(False), torch.no_grad():
            keys, values = self.keys, self.values
            count = keys.shape[2]
            room[0, :, :, :count], room[1, :, :, :count] = keys, values
        self._keys = self._values = None
        self.settle(Count(0))
        self.room, self.before = room, count


class RoomyLayer(_Roomy, DynamicLayer):
    """A dynamic layer with room."""

    def get_seq_length(self) -> int:
        """Return the number of tokens; asked for at every step."""
        return self.filled if self.room is not None else super().get_seq_length()


class RoomySlidingLayer(_Roomy, DynamicSlidingWindowLayer):
    """A sliding layer with room: shows what its window needs, and holds more."""

    _seen = 0

    @property
    def cumulative_length(self) -> int:
        """All tokens that the layer has seen."""
        return self._seen + self.count.appended

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self._seen = length - self.count.appended

    def activate_past_recording(self) -> None:
        """Leave the cache to transformers, which will take tokens back."""
        self.count.room = 0
        super().activate_past_recording()

    def settle(self, count: Count) -> None:
        """Count further tokens anew."""
        self._seen = self.cumulative_length
        super().settle(count)

    def _shown(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, max(0, self.filled - self.sliding_window + 1) : self.filled]


_OF: dict[Any, Any] = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}


def adopt(layers: list[Any], dtype: torch.dtype) -> Count | None:
    """Turn a cache's layers of one sequence into roomy ones that share a count, or do nothing."""
    for layer in layers:
        known = type(layer) in _OF or isinstance(layer, _Roomy)
        if not known or getattr(layer, "record_past", False) or not layer.get_seq_length():
            return None
        keys = layer.keys
        if not keys.is_cpu or keys.dtype != dtype or keys.shape[0] != 1:
            return None
    for index, layer in enumerate(layers):
        if type(layer) in _OF:
            layers[index] = _roomy(layer)
    full = [x for x in layers if x.room is None or x.filled == x.room.shape[3]]
    for layer, room in zip(full, _rooms([x.room_needed() for x in full], dtype), strict=True):
        layer.move(room)
    count = Count(min(layer.room.shape[3] - layer.filled for layer in layers))
    for layer in layers:
        layer.settle(count)
    return count


def _rooms(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield rooms of these shapes, one after the other in large pages.

    All zeros, which is what a block whose attention is left out goes on to keep. After 512 tokens a
    step of SmolLM2 in int4 takes 3.64 ms instead of 3.96, after 16 the same; the first one, which
    makes the rooms, takes 0.4 to 1 ms longer.
    """
    sizes = [math.prod(shape) for shape in shapes]
    memory = map_pages(max(1, sum(sizes)) * dtype.itemsize)
    start = 0
    for shape, size in zip(shapes, sizes, strict=True):
        with torch.inference_mode(False):
            flat = torch.frombuffer(memory, dtype=dtype, count=size, offset=start * dtype.itemsize)
            room = flat.view(shape)
        yield room
        start += size


def _roomy(layer: Any) -> Any:
    """Return a roomy layer that is what a plain one was."""
    kind = _OF[type(layer)]
    roomy = kind.__new__(kind)
    roomy.count = Count(0)
    for name, value in vars(layer).items():
        setattr(roomy, name, value)
    return roomy
