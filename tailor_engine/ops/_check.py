"""The checks that op declarations share: one clear line with names and numbers."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dimensions(op_name: str, name: str, tensor: Tensor, count: int) -> None:
    """Require a number of dimensions."""
    if tensor.dim() != count:
        raise ValueError(
            f"{op_name}: {name} must have {count} dimensions, got shape {list(tensor.shape)}"
        )


def shape(op_name: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Require an exact shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{op_name}: {name} must have shape {list(expected)}, got {list(tensor.shape)}"
        )


def dtype(op_name: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Require one of a few dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op_name}: {name} must be {names}, got {got}")


def contiguous(op_name: str, name: str, tensor: Tensor) -> None:
    """Require a contiguous tensor where a kernel writes into the caller's memory."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op_name}: {name} must be contiguous, got strides {list(tensor.stride())}"
        )


def token_mask(op_name: str, mask: Tensor | None, tokens: int) -> None:
    """Require a bool mask of one value a token."""
    if mask is not None:
        shape(op_name, "mask", mask, (tokens,))
        dtype(op_name, "mask", mask, (torch.bool,))


# How native code is told a dtype; the same numbers stand in csrc/cpu/prelude.h.
CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}


def pointer(tensor: Tensor | None) -> int:
    """Return the address that native code reads; zero stands for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x with unit stride along its last dimension (a copy only where it is not so)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def even_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return x with its rows evenly spaced (a copy only where they are not), and their distance."""
    if x.is_contiguous() or x.dim() < 2:
        return x.contiguous(), x.shape[-1]
    x = rows_contiguous(x).flatten(0, -2)
    return x, x.stride(0)


def is_readable(tensor: Tensor) -> bool:
    """Say whether a check may look at the values: on the CPU, and not while torch traces shapes."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def ids(op_name: str, name: str, tensor: Tensor, size: int, ignored: int | None = None) -> None:
    """Require int64 values from 0 to size - 1, or the ignored value.

    The values are looked at on the CPU only: elsewhere that would wait for the device.
    """
    dtype(op_name, name, tensor, (torch.int64,))
    if tensor.numel() == 0 or not is_readable(tensor):
        return
    low, high = (int(v) for v in torch.aminmax(tensor))
    if ignored is not None and low < 0:
        rest = tensor[tensor != ignored]
        low = int(rest.min()) if rest.numel() else 0
    if low < 0 or high >= size:
        either, got = "" if ignored is None else f", or {ignored}", low if low < 0 else high
        raise ValueError(f"{op_name}: {name} must be from 0 to {size - 1}{either}, got {got}")
