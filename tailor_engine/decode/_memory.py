"""All weights of a network in one piece of memory, in the order in which a token reads them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGNMENT = 64  # a cache line


def gather(tensors: Iterable[Tensor]) -> None:
    """Move tensors into one piece of memory, in large pages where the system has them.

    Each stays the object that it is, and what shared memory with another still does.
    """
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    sizes = [group[0].untyped_storage().nbytes() for group in groups.values()]
    rounded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    if not sum(rounded):
        return
    memory = mmap.mmap(-1, sum(rounded))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    arena = torch.frombuffer(memory, dtype=torch.uint8)
    start = 0
    for group, size, step in zip(list(groups.values()), sizes, rounded, strict=True):
        old = torch.empty(0, dtype=torch.uint8).set_(group[0].untyped_storage())
        arena[start : start + size] = old
        for tensor in group:
            offset = start // tensor.element_size() + tensor.storage_offset()
            tensor.set_(arena.untyped_storage(), offset, tensor.shape, tensor.stride())
        start += step
