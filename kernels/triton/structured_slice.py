"""structured_slice: the kept rows and columns of a whole model's matrices in one launch, exactly.

A table on the device describes each matrix; a list behind it says which matrix a program works on,
so one kernel serves one matrix and five hundred, of any dtype. Both are made on the host and copied
once, from pinned memory, without waiting for the device.

What it costs: one read and one write of what is kept. Whole rows move as units of up to 16 bytes,
counted through the matrix as if it were one line: no row's end leaves threads idle. Gathered
columns move one element at a time from tiles of 16 rows, which share the columns' indices.

Indices on a GPU cannot be checked without waiting for it. The kernel holds each within the matrix,
so that a wrong one reads no foreign memory, and marks it; an assertion on the device then stops the
program as torch's own `index_select` does: with a CUDA error at the next synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = tl.constexpr(12)  # of a matrix in the table: see `line_of`
UNITS = (16, 8, 4, 2, 1)  # bytes that a thread may move at once, as the kernel numbers them
GATHERED = len(UNITS) - 1  # added to the number of a unit that is one gathered element


def describe(*_: Sequence[Tensor | None]) -> tuple[()]:
    """Return what a configuration depends on: nothing, of the op's arguments."""
    return ()


def config() -> dict[str, int]:
    """Choose what one program copies; it does not depend on the shapes.

    | what | why |
    |---|---|
    | line: 2048 units (1024 of 16 bytes) by 4 warps | 16 KB of whole rows, 128 bytes a thread under
      way: two such programs a processor cover the 16 KB that 3 TB/s at 700 ns ask of each |
    | 16 x 256 gathered elements | a column index is read once for 16 rows; 32 elements a thread |
    """
    return {"line": 2048, "rows": 16, "columns": 256, "warps": 4}


def candidates() -> list[dict[str, int]]:
    """Return the choices that a measurement decides between, the usual one first."""
    usual = config()
    others = [{"line": 4096, "warps": 8}, {"line": 1024}, {"rows": 32, "columns": 128}]
    return [usual, *({**usual, **other} for other in others)]


@triton.jit
def index_of(ids, place, inside, size, wrong):
    """Return a kept index, held within 0..size - 1; without ids the place itself."""
    kept = place.to(tl.int64)
    if ids != 0:
        kept = tl.load(ids.to(tl.pointer_type(tl.int64)) + place, mask=inside, other=0)
        bad = inside & ((kept < 0) | (kept >= size))
        tl.store(wrong + tl.zeros_like(kept), tl.zeros_like(kept), mask=bad)
        kept = tl.minimum(tl.maximum(kept, 0), size - 1)
    return kept


@triton.jit
def copy_rows(
    matrix, local, wrong, ELEMENT: tl.constexpr, BYTES: tl.constexpr, PER: tl.constexpr,
    LINE: tl.constexpr,
):  # fmt: skip
    """Copy LINE units of whole rows; a unit is BYTES, PER elements that are loaded at once."""
    source = tl.multiple_of(tl.load(matrix).to(tl.pointer_type(ELEMENT)), BYTES)
    target = tl.multiple_of(tl.load(matrix + 1).to(tl.pointer_type(ELEMENT)), BYTES)
    count_c = tl.load(matrix + 5)
    begin = local * LINE
    first = begin // count_c  # one wide division a program; those of the units are narrow
    unit = tl.arange(0, LINE)
    place = (begin - first * count_c).to(tl.int32) + unit
    down = place // count_c.to(tl.int32)
    inside = begin + unit < tl.load(matrix + 4) * count_c
    kept = index_of(tl.load(matrix + 2), first + down, inside, tl.load(matrix + 8), wrong)
    source += (kept * tl.load(matrix + 6) + (place - down * count_c.to(tl.int32))) * PER
    target += (begin + unit) * PER
    part = tl.arange(0, PER)[None, :]
    value = tl.load(source[:, None] + part, mask=inside[:, None])
    tl.store(target[:, None] + part, value, mask=inside[:, None])


@triton.jit
def copy_columns(
    matrix, local, wrong, ELEMENT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Copy a tile of gathered elements."""
    source = tl.load(matrix).to(tl.pointer_type(ELEMENT))
    target = tl.load(matrix + 1).to(tl.pointer_type(ELEMENT))
    count_c = tl.load(matrix + 5)
    across = (count_c + BC - 1) // BC
    r = (local // across) * BR + tl.arange(0, BR)
    c = (local % across) * BC + tl.arange(0, BC)
    inside_r, inside_c = r < tl.load(matrix + 4), c < count_c
    from_r = index_of(tl.load(matrix + 2), r, inside_r, tl.load(matrix + 8), wrong)
    from_c = index_of(tl.load(matrix + 3), c, inside_c, tl.load(matrix + 9), wrong)
    source += (from_r * tl.load(matrix + 6))[:, None] + (from_c * tl.load(matrix + 7))[None, :]
    inside = inside_r[:, None] & inside_c[None, :]
    value = tl.load(source, mask=inside)
    tl.store(target + r[:, None] * count_c + c[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["matrices"])
def copy_kernel(
    table, matrices, LINE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Copy one program's part of the matrix that the table gives it."""
    index = tl.program_id(0)
    owners = table + matrices * FIELDS
    wrong = owners + tl.num_programs(0)
    matrix = table + tl.load(owners + index) * FIELDS
    local = index - tl.load(matrix + 10)
    kind = tl.load(matrix + 11)
    if kind == 0:
        copy_rows(matrix, local, wrong, tl.int64, 16, 2, LINE // 2)
    elif kind == 1:
        copy_rows(matrix, local, wrong, tl.int64, 8, 1, LINE)
    elif kind == 2:
        copy_rows(matrix, local, wrong, tl.int32, 4, 1, LINE)
    elif kind == 3:
        copy_rows(matrix, local, wrong, tl.int16, 2, 1, LINE)
    elif kind == 4:
        copy_rows(matrix, local, wrong, tl.int8, 1, 1, LINE)
    elif kind == 5:
        copy_columns(matrix, local, wrong, tl.int64, BR, BC)
    elif kind == 6:
        copy_columns(matrix, local, wrong, tl.int32, BR, BC)
    elif kind == 7:
        copy_columns(matrix, local, wrong, tl.int16, BR, BC)
    else:
        copy_columns(matrix, local, wrong, tl.int8, BR, BC)


def line_of(
    weight: Tensor, rows: Tensor | None, columns: Tensor | None, out: Tensor, first: int,
    chosen: dict[str, int],
) -> tuple[list[int], int]:  # fmt: skip
    """Return a matrix's line of the table, and how many programs copy it."""
    size, (count_r, count_c) = weight.element_size(), out.shape
    if columns is not None or weight.stride(1) != 1:
        kind, scale = GATHERED + UNITS.index(size), 1
        down, across = triton.cdiv(count_r, chosen["rows"]), triton.cdiv(count_c, chosen["columns"])
        programs = down * across
    else:
        places = weight.data_ptr(), weight.stride(0) * size, out.data_ptr(), count_c * size
        unit = next(unit for unit in UNITS if all(place % unit == 0 for place in places))
        kind, scale = UNITS.index(unit), unit // size
        count_c //= scale
        units = chosen["line"] // (2 if unit == 16 else 1)
        programs = triton.cdiv(count_r * count_c, units)
    line = [weight.data_ptr(), out.data_ptr()]
    line += [0 if ids is None else ids.data_ptr() for ids in (rows, columns)]
    line += [count_r, count_c, weight.stride(0) // scale, weight.stride(1), *weight.shape]
    return [*line, first, kind], programs


def launch(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    chosen: dict[str, int] | None = None,
) -> list[Tensor]:
    """Allocate the results and copy into all of them at once."""
    chosen = chosen or config()
    outputs: list[Tensor] = []
    alive: list[Tensor | None] = []  # until the kernel is launched
    lines: list[list[int]] = []
    programs: list[int] = []
    for weight, row, column in zip(weights, rows, columns, strict=True):
        shape = list(weight.shape)
        shape[0] = shape[0] if row is None else row.numel()
        shape[-1] = shape[-1] if column is None else column.numel()
        out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        outputs.append(out)
        if not out.numel():
            continue
        row, column = (None if ids is None else ids.contiguous() for ids in (row, column))
        alive += [row, column]
        if weight.dim() == 1:  # a vector is one row, its kept rows are columns
            weight, row, column, out = weight[None], None, row, out[None]
        line, count = line_of(weight, row, column, out, sum(programs), chosen)
        lines.append(line)
        programs.append(count)
    if lines:
        table = on_device(lines, programs, outputs[0].device)
        copy_kernel[(sum(programs),)](
            table, len(lines), LINE=chosen["line"], BR=chosen["rows"], BC=chosen["columns"],
            num_warps=chosen["warps"],
        )  # fmt: skip
        if any(ids is not None for ids in alive):
            torch._assert_async(table[-1], "structured_slice: an index is out of range")
    return outputs


def on_device(lines: list[list[int]], programs: list[int], device: torch.device) -> Tensor:
    """Return the matrices, the matrix of each program, and a 1 that a wrong index turns to 0."""
    owners = torch.repeat_interleave(torch.arange(len(lines)), torch.tensor(programs))
    table = torch.cat([torch.tensor(lines).flatten(), owners, torch.ones(1, dtype=torch.int64)])
    if device.type == "cuda":
        table = table.pin_memory()  # so that the copy does not wait for the device
    return table.to(device, non_blocking=True)
