"""Cache layers with room for tokens to come, in the place of transformers' dynamic ones.

A dynamic layer copies all its keys and values for every token. These keep them in memory that is
larger than needed, where the native step writes; everything else (masks, cropping, beams, copies)
is transformers' own code, which sees `keys` and `values` as ever and may set them to other tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST = 256  # tokens; beyond it the room doubles


class _Roomy:
    """Keys and values lie in `room` [2, 1, G, capacity, D], or are tensors like any others."""

    room: Tensor | None = None
    filled = 0
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

    def _leave(self) -> None:
        if self.room is not None:
            self._keys, self._values = self.keys, self.values
            self.room = None

    def _shown(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, : self.filled]

    def appended(self) -> None:
        """Count the token that was written behind the others."""
        self.filled += 1

    def has_room(self) -> bool:
        """Say whether the next token can be written."""
        return self.room is not None and self.filled < self.room.shape[3]

    def make_room(self) -> None:
        """Copy keys and values to where one more token, and as many again, can follow."""
        with torch.inference_mode(False), torch.no_grad():
            keys, values = self.keys, self.values
            count = keys.shape[2]
            capacity = max(LEAST, 2 * count)
            room = keys.new_zeros(2, *keys.shape[:2], capacity, keys.shape[3])
            room[0, :, :, :count], room[1, :, :, :count] = keys, values
        self._keys = self._values = None
        self.room, self.filled = room, count


class RoomyLayer(_Roomy, DynamicLayer):
    """A dynamic layer with room."""

    def get_seq_length(self) -> int:
        """Return the number of tokens; asked for at every step."""
        return self.filled if self.room is not None else super().get_seq_length()


class RoomySlidingLayer(_Roomy, DynamicSlidingWindowLayer):
    """A sliding layer with room: shows what its window needs, and holds more."""

    def _shown(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, max(0, self.filled - self.sliding_window + 1) : self.filled]

    def appended(self) -> None:
        """Count the token that was written behind the others."""
        self.filled += 1
        self.cumulative_length += 1


_OF: dict[Any, Any] = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}


def adopt(layers: list[Any], dtype: torch.dtype) -> bool:
    """Turn a cache's layers of one sequence into roomy ones; False where one cannot be."""
    for layer in layers:
        known = type(layer) in _OF or isinstance(layer, _Roomy)
        if not known or getattr(layer, "record_past", False) or not layer.get_seq_length():
            return False
        keys = layer.keys
        if not keys.is_cpu or keys.dtype != dtype or keys.shape[0] != 1:
            return False
    for index, layer in enumerate(layers):
        if type(layer) in _OF:
            layers[index] = _roomy(layer)
        if not layers[index].has_room():
            layers[index].make_room()
    return True


def _roomy(layer: Any) -> Any:
    """Return a roomy layer that is what a plain one was."""
    kind = _OF[type(layer)]
    roomy = kind.__new__(kind)
    for name, value in vars(layer).items():
        setattr(roomy, name, value)
    return roomy
