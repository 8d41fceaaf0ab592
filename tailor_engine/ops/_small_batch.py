"""Products of few tokens on a GPU, and which path a quantized linear takes there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._op import Op

ROWS = 16  # tokens; kSmallBatchRows in csrc/cuda/ops.h
UNPACK = 2048  # tokens


def path(
    tokens: int,
    features: int,
    width: int,
    bits: int,
    dtype: torch.dtype,
    layout: str,
    quantize_activations: bool,
) -> str:
    """Return how a quantized linear runs on a GPU with the CUDA module: a pure function.

    | path          | when                                   | reason                              |
    |---------------|----------------------------------------|-------------------------------------|
    | "small batch" | 1 to 16 tokens, "cpu" panels, operands | the read of the weight is the time; |
    |               | that a tensor core takes as they are   | panels are its A operand already    |
    | "unpack"      | from 2048 tokens, 4 bits, "cpu"        | unpacking costs 598 / T of cuBLAS's |
    |               | panels, tokens not quantized           | product, which waits for no codes   |
    | "triton"      | everything else                        | tiles of 64 tokens and more are its |
    """
    if layout != "cpu" or not features or not width or dtype == torch.float64:
        return "triton"
    exact = not quantize_activations
    as_they_are = bits == 4 and dtype != torch.float32 if exact else True
    if 1 <= tokens <= ROWS and as_they_are:
        return "small batch"
    return "unpack" if tokens >= UNPACK and exact and bits == 4 else "triton"


def elsewhere(linear: Op, device: str) -> Any:
    """Return the implementation that takes what the CUDA module leaves: Triton's, or torch's."""
    return linear.implementation("reference" if linear.missing("triton", device) else "triton")


@functools.cache
def machine(native: Any, device: torch.device) -> Any:
    """Return what a launch may count on: multiprocessors, and clusters of 8 since Hopper."""
    card = torch.cuda.get_device_properties(device)
    return native.Machine(card.multi_processor_count, 8 if card.major >= 9 else 1)


@contextlib.contextmanager
def queue(device: torch.device) -> Iterator[int]:
    """Make a device the current one, and give the stream that torch uses there."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def linear(
    native: Any,
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    quantize_activations: bool,
) -> Tensor:
    """Multiply few tokens with a weight in panels; group 0 stands for 8 bits."""
    features, width = scale.shape[0], x.shape[-1]
    x = _aligned(x)
    y = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    rows = y.numel() // features
    data, scale, zero = _aligned(data), _aligned(scale), None if zero is None else _aligned(zero)
    if bias is not None:
        bias = (bias.float() if bias.dtype == torch.float64 else bias).contiguous()
    workspace = None
    if quantize_activations:
        size = native.small_batch_workspace(rows, width)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    problem = native.Linear(
        x.data_ptr(), check.CODES[x.dtype], rows, width, features, data.data_ptr(),
        scale.data_ptr(), check.pointer(zero), check.pointer(bias),
        0 if bias is None else check.CODES[bias.dtype], y.data_ptr(), check.pointer(workspace),
    )  # fmt: skip
    with queue(x.device) as stream:
        if group:
            native.int4_linear(problem, group, machine(native, x.device), stream)
        else:
            native.int8_linear(problem, machine(native, x.device), stream)
    return y


def unpacked_linear(
    native: Any,
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """Multiply many tokens with an int4 weight in panels that is unpacked once, in their dtype."""
    dense = torch.empty(scale.shape[0], x.shape[-1], dtype=x.dtype, device=x.device)
    data, scale, zero = (
        _aligned(data),
        scale.contiguous(),
        None if zero is None else zero.contiguous(),
    )
    with queue(x.device) as stream:
        native.int4_dequantize_panels(
            data.data_ptr(), scale.data_ptr(), check.pointer(zero), *dense.shape, group,
            dense.data_ptr(), check.CODES[x.dtype], stream,
        )  # fmt: skip
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that starts at a multiple of 16 bytes; a copy only if it must."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
