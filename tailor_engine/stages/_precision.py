"""Which number format a device is fast at: decided by a measurement, never by the device's name."""

from __future__ import annotations

import functools
import time

import torch

#: bfloat16 must win by this much before it is worth its rounding: autocast adds casts of weights
#: and gradients that a bare product does not show.
WORTH = 1.5
_SHAPE = (512, 576, 1536)  # tokens, in, out: a feed-forward product of a 135M model


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype that products are made in: float32, or bfloat16 where it pays.

    `wanted` is "float32", "bfloat16" or "auto" (measured once a process).
    """
    if wanted == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def fast_bfloat16(device: torch.device) -> bool:
    """Say whether bfloat16 products run at least 1.5 times as fast as float32 ones here."""
    return bfloat16_speedup(device.type, torch.get_num_threads()) >= WORTH


@functools.cache
def bfloat16_speedup(device: str, threads: int) -> float:
    """Return time(float32) / time(bfloat16) of one product and its two gradients, best of five."""
    del threads  # a key of the cache: the ratio depends on it
    times = {}
    with torch.random.fork_rng(devices=[]):
        for dtype in (torch.float32, torch.bfloat16):
            tokens, inner, outer = _SHAPE
            x = torch.randn(tokens, inner, device=device).to(dtype)
            weight = torch.randn(outer, inner, device=device).to(dtype)
            times[dtype] = min(_seconds(x, weight, device) for _ in range(5))
    return times[torch.float32] / times[torch.bfloat16]


def _seconds(x: torch.Tensor, weight: torch.Tensor, device: str) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        y = x @ weight.T
        _ = y @ weight, y.T @ x
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def autocast(device: torch.device, wanted: str = "auto") -> torch.autocast:
    """Return the context of a forward pass: bfloat16 products where they pay, else none."""
    dtype = precision(wanted, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)
