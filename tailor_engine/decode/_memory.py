"""All weights of a network in one piece of memory, in the order in which a token reads them."""

from __future__ import annotations

import contextlib
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
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    sizes = [group[0].untyped_storage().nbytes() for group in groups.values()]
    rounded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    if not sum(rounded):
        return
    memory = map_pages(sum(rounded))
    start = 0
    for group, size, step in zip(groups.values(), sizes, rounded, strict=True):
        if size:
            # A storage for each, not one for all: pickling a tensor writes its whole storage.
            new = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
            new.copy_(torch.empty(0, dtype=torch.uint8).set_(group[0].untyped_storage()))
            for tensor in group:
                place = tensor.storage_offset(), tensor.shape, tensor.stride()
                tensor.set_(new.untyped_storage(), *place)
        start += step


def map_pages(size: int) -> mmap.mmap:
    """Return zeros, in large pages where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    # Python's default is shared memory, which most systems never give large pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
