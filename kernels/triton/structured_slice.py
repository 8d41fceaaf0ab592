"""structured_slice: the kept rows and columns of many matrices in a few launches, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def config(width: int, gather: bool) -> dict[str, int]:
    """Choose the tile: 16 rows of 1 KB where rows are whole, of 256 elements where gathered."""
    return {"block_r": 16, "block_c": 256 if gather else 1024 // width, "warps": 4}


def widest(source: Tensor, target: Tensor, columns: Tensor | None) -> int:
    """Return the bytes of the widest element that copies the rows; its own where gathered."""
    size = source.element_size()
    if columns is not None or source.stride(1) != 1:
        return size
    for width in (8, 4, 2):
        places = (source.data_ptr(), source.stride(0) * size, target.shape[1] * size)
        if width > size and all(place % width == 0 for place in places):
            return width
    return size


@triton.jit
def copy_kernel(
    table, matrices, ELEMENT: tl.constexpr, GATHER: tl.constexpr,
    SLOTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Copy one tile; the table says which matrix it belongs to and where the values lie."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    first = tl.load(table + slot * 9 + 8, mask=slot < matrices, other=0x7FFFFFFFFFFFFFFF)
    row = table + (tl.sum((first <= index).to(tl.int32), 0) - 1) * 9
    source = tl.load(row).to(tl.pointer_type(ELEMENT))
    target = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    row_ids = tl.load(row + 2)
    column_ids = tl.load(row + 3)
    count_r = tl.load(row + 4)
    count_c = tl.load(row + 5)
    stride_r = tl.load(row + 6)
    local = index - tl.load(row + 8)
    across = (count_c + BC - 1) // BC
    r = (local // across) * BR + tl.arange(0, BR)
    c = (local % across) * BC + tl.arange(0, BC)
    inside_r = r < count_r
    inside_c = c < count_c
    # Compared as vectors: the interpreter's scalar truth values make masks of a wrong dtype.
    kept = inside_r & (row_ids + tl.zeros([BR], tl.int64) != 0)
    from_r = tl.load(row_ids.to(tl.pointer_type(tl.int64)) + r, mask=kept, other=0)
    from_r = tl.where(row_ids != 0, from_r, r)
    from_c = c
    if GATHER:
        kept = inside_c & (column_ids + tl.zeros([BC], tl.int64) != 0)
        from_c = tl.load(column_ids.to(tl.pointer_type(tl.int64)) + c, mask=kept, other=0)
        from_c = tl.where(column_ids != 0, from_c, c) * tl.load(row + 7)
    inside = inside_r[:, None] & inside_c[None, :]
    value = tl.load(source + from_r[:, None] * stride_r + from_c[None, :], mask=inside)
    tl.store(target + r[:, None] * count_c + c[None, :], value, mask=inside)


def describe(
    weight: Tensor, rows: Tensor | None, columns: Tensor | None, out: Tensor, first: int, width: int
) -> tuple[list[int], int]:
    """Return a matrix's line of the table, and the first tile of the next matrix."""
    gather = is_gathered(weight, columns)
    chosen = config(width, gather)
    scale = width // weight.element_size()
    count_r, count_c = out.shape[0], out.shape[1] // scale
    tiles = triton.cdiv(count_r, chosen["block_r"]) * triton.cdiv(count_c, chosen["block_c"])
    line = [weight.data_ptr(), out.data_ptr()]
    line += [0 if ids is None else ids.data_ptr() for ids in (rows, columns)]
    line += [count_r, count_c, weight.stride(0) // scale, weight.stride(1), first]
    return line, first + tiles


def is_gathered(weight: Tensor, columns: Tensor | None) -> bool:
    """Whether the columns are not simply consecutive in memory."""
    return columns is not None or weight.stride(1) != 1


def launch(
    weights: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
) -> list[Tensor]:
    """Sort the matrices by element width and way of copying; one launch for each kind."""
    outputs: list[Tensor] = []
    kinds: dict[tuple[int, bool], list] = {}
    for weight, row, column in zip(weights, rows, columns, strict=True):
        shape = list(weight.shape)
        shape[0] = shape[0] if row is None else row.numel()
        shape[-1] = shape[-1] if column is None else column.numel()
        out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        outputs.append(out)
        if not out.numel():
            continue
        kept = [None if ids is None else ids.contiguous() for ids in (row, column)]
        item = (weight, *kept, out)
        if weight.dim() == 1:  # a vector is one row, its kept rows are columns
            item = (weight[None], None, kept[0], out[None])
        kind = widest(item[0], item[3], item[2]), is_gathered(item[0], item[2])
        kinds.setdefault(kind, []).append(item)
    for (width, gather), items in kinds.items():
        copy(items, width, gather)
    return outputs


def copy(items: list[tuple], width: int, gather: bool) -> None:
    """Launch one grouped copy over a table of matrices on the device."""
    lines, first = [], 0
    for item in items:
        line, first = describe(*item, first, width)
        lines.append(line)
    table = torch.tensor(lines, dtype=torch.int64)
    device = items[0][0].device
    if device.type == "cuda":
        table = table.pin_memory()  # so that the copy does not wait for the device
    table = table.to(device, non_blocking=True)
    chosen = config(width, gather)
    copy_kernel[(first,)](
        table, len(lines), ELEMENT=ELEMENTS[width], GATHER=gather,
        SLOTS=max(triton.next_power_of_2(len(lines)), 2), BR=chosen["block_r"],
        BC=chosen["block_c"], num_warps=chosen["warps"],
    )  # fmt: skip
