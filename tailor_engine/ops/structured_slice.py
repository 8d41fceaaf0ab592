"""Structured slicing: the kept rows and columns of many weights in one call, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._op import op, threads

Kept = Sequence[Tensor | None]


def reference(weights: Sequence[Tensor], rows: Kept, columns: Kept) -> list[Tensor]:
    """Return ``weight[rows][:, columns]`` of every weight, contiguous and new.

    Shapes: each weight [N, K] or [N] (then its columns are None), any strides; rows and columns are
        as long as weights, each item [kept] or None, which keeps all.
    Numbers: any dtype of 1, 2, 4 or 8 bytes, copied bit for bit; indices int64, in any order,
        duplicates allowed, negative ones not.
    Raises: ValueError for lists of different lengths or an index out of range, TypeError for
        dtypes. On a GPU an index out of range reads nothing foreign and ends in a CUDA error at
        the next synchronisation, as with torch.index_select.
    """
    return [_one(*item) for item in zip(weights, rows, columns, strict=True)]


def _one(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    kept = weight if rows is None else weight.index_select(0, rows)
    if columns is not None:
        kept = kept.index_select(1, columns)
    return kept.clone() if kept is weight and kept.is_contiguous() else kept.contiguous()


def _check(weights: Sequence[Tensor], rows: Kept, columns: Kept) -> None:
    if not len(weights) == len(rows) == len(columns):
        raise ValueError(
            "structured_slice: weights, rows and columns must be lists of one length, "
            f"got {len(weights)}, {len(rows)} and {len(columns)}"
        )
    for i, (weight, row, column) in enumerate(zip(weights, rows, columns, strict=True)):
        if weight.dim() not in (1, 2):
            raise ValueError(
                f"structured_slice: weights[{i}] must have 1 or 2 dimensions, "
                f"got shape {list(weight.shape)}"
            )
        if weight.element_size() > 8:
            raise TypeError(
                f"structured_slice: weights[{i}] must have elements of 1, 2, 4 or 8 bytes, "
                f"got {weight.dtype}"
            )
        if weight.dim() == 1 and column is not None:
            raise ValueError(
                f"structured_slice: columns[{i}] must be None, for weights[{i}] has one dimension"
            )
        for name, kept, size in (("rows", row, 0), ("columns", column, -1)):
            if kept is not None:
                label = f"{name}[{i}]"
                check.dimensions("structured_slice", label, kept, 1)
                check.ids("structured_slice", label, kept, weight.shape[size])
                if kept.numel() and not weight.shape[size]:  # said without a look at the values
                    raise ValueError(f"structured_slice: {label} must be empty, as weights[{i}] is")


def _cpu(native: Any, weights: Sequence[Tensor], rows: Kept, columns: Kept) -> list[Tensor]:
    results, table, alive = [], [], []
    for weight, row, column in zip(weights, rows, columns, strict=True):
        row, column = (None if i is None else i.contiguous() for i in (row, column))
        shape = list(weight.shape)
        shape[0] = shape[0] if row is None else row.numel()
        shape[-1] = shape[-1] if column is None else column.numel()
        result = torch.empty(shape, dtype=weight.dtype)
        # A vector is a matrix of one column.
        width, stride = (1, 1) if weight.dim() == 1 else (shape[1], weight.stride(1))
        table += [weight.data_ptr(), result.data_ptr(), shape[0], width, check.pointer(row)]
        table += [check.pointer(column), weight.stride(0), stride, weight.element_size()]
        table.append(weight.shape[-1])
        results.append(result)
        alive += [row, column]
    fields = torch.tensor(table, dtype=torch.int64)
    native.structured_slice(fields.data_ptr(), len(results), threads())
    return results


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (100 * torch.randn(*shape, generator=generator)).to(dtype)

    def kept(count: int, size: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values

    yield [], [], []
    yield [weight(1, 1)], [kept(1, 1)], [None]
    yield (
        [weight(40, 33), weight(33, 40), weight(40), weight(7, 5)],
        [kept(17, 40), None, kept(17, 40), None],
        [None, kept(17, 40), None, None],
    )
    yield [weight(50, 70)], [kept(30, 50)], [kept(41, 70)]
    for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool):
        yield [weight(20, 66, dtype=dtype)], [kept(13, 20)], [kept(50, 66)]
        yield [weight(20, 66, dtype=dtype).T], [kept(13, 66)], [None]
    yield [weight(9, 300)[::2, 7:250]], [None], [kept(100, 243)]
    yield [weight(6, 8)], [torch.tensor([5, 0, 0, 3])], [torch.tensor([7, 7, 1], dtype=torch.int64)]
    yield (
        [weight(6, 8), weight(0, 4)],
        [torch.zeros(0, dtype=torch.int64), None],
        [None, kept(2, 4)],
    )


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    weight, kept = torch.zeros(4, 8), torch.tensor([0, 3])
    yield ([weight], [None, None], [None]), ValueError, "lists of one length, got 1, 2 and 1"
    yield ([weight[None]], [None], [None]), ValueError, "weights[0] must have 1 or 2 dimensions"
    yield ([weight.to(torch.complex128)], [None], [None]), TypeError, "1, 2, 4 or 8 bytes"
    yield ([weight[0]], [None], [kept]), ValueError, "columns[0] must be None"
    yield ([weight], [kept[None]], [None]), ValueError, "rows[0] must have 1 dimensions"
    yield ([weight], [kept.int()], [None]), TypeError, "rows[0] must be int64, got int32"
    yield ([weight], [kept + 1], [None]), ValueError, "rows[0] must be from 0 to 3, got 4"
    yield ([weight], [None], [kept - 1]), ValueError, "columns[0] must be from 0 to 7, got -1"


def _cost(weights: Sequence[Tensor], rows: Kept, columns: Kept) -> tuple[float, float]:
    """One read and one write of what is kept."""
    total = 0
    for weight, row, column in zip(weights, rows, columns, strict=True):
        shape = list(weight.shape)
        shape[0] = shape[0] if row is None else row.numel()
        shape[-1] = shape[-1] if column is None else column.numel()
        total += 2 * weight.element_size() * torch.Size(shape).numel()
    return total, 0


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    """SmolLM2's projections, eight layers a call, and one larger than the last-level cache."""
    generator = torch.Generator().manual_seed(0)

    def kept(size: int, share: float, group: int = 1) -> Tensor:
        count = size // group
        chosen = torch.randperm(count, generator=generator)[: int(share * count)].sort()[0]
        return (chosen[:, None] * group + torch.arange(group)).flatten()

    def matrices(dtype: torch.dtype, features: int, width: int, count: int = 8) -> list[Tensor]:
        return [torch.randn(features, width).to(dtype) for _ in range(count)]

    for dtype in (torch.float32, torch.bfloat16):
        for share in (0.5, 0.8):
            half = [kept(1536, share)] * 8
            label = f"{100 * share:.0f} % of"
            yield f"{label} 8 x 1536x576", (matrices(dtype, 1536, 576), half, [None] * 8)
            yield f"8 x 576x1536, {label}", (matrices(dtype, 576, 1536), [None] * 8, half)
        heads = [kept(576, 2 / 3, 64)] * 8
        yield "8 x 576x576, 6 of 9 heads", (matrices(dtype, 576, 576), [None] * 8, heads)
        large = matrices(dtype, 4096, 11008, 1)
        yield "4096x11008, 80 % of", (large, [None], [kept(11008, 0.8)])


structured_slice = op(
    __name__,
    "(Tensor[] weights, Tensor?[] rows, Tensor?[] columns) -> Tensor[]",
    arithmetic="none",
    exact=True,
)
