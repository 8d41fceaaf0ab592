"""Which number format a device is fast at: decided by a measurement, never by the device's name."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from tailor_engine.stages._stage import context

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


def training_precision(config: Any, device: torch.device) -> torch.dtype:
    """Return the dtype of a training; one that goes on from a checkpoint keeps what it began with.

    The measurement may come out differently the next time, or on the machine that goes on.
    """
    state = context().load_checkpoint() if config.precision == "auto" else None
    if state and state.get("fingerprint", "").startswith(f"{config} "):
        return precision(state["precision"], device)
    return precision(config.precision, device)


def autocast(device: torch.device, wanted: str = "auto") -> torch.autocast:
    """Return the context of a forward pass in that dtype."""
    dtype = precision(wanted, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)


def fast_bfloat16(device: torch.device) -> bool:
    """Say whether bfloat16 products run at least 1.5 times as fast as float32 ones here."""
    return bfloat16_speedup(device.type, torch.get_num_threads()) >= WORTH


@functools.cache
def bfloat16_speedup(device: str, threads: int) -> float:
    """Return time(float32) / time(bfloat16) of one product and its two gradients, best of seven.

    The two take turns, so that other work on the machine slows both alike.
    """
    del threads  # a key of the cache: the ratio depends on it
    tokens, inner, outer = _SHAPE
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(7):
        for dtype, known in best.items():
            x = torch.ones(tokens, inner, device=device, dtype=dtype)
            weight = torch.ones(outer, inner, device=device, dtype=dtype)
            best[dtype] = min(known, _seconds(x, weight, device))
    return best[torch.float32] / best[torch.bfloat16]


@torch.no_grad()
def _seconds(x: torch.Tensor, weight: torch.Tensor, device: str) -> float:
    start = time.perf_counter()
    y = x @ weight.T
    _ = y @ weight, y.T @ x
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
