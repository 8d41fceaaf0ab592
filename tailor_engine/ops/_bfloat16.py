"""How fast bfloat16 products are here: decided by a measurement, never by the processor's name."""

from __future__ import annotations

import functools
import time

import torch

# Tokens, in, out. On the CPU a feed-forward product of a 135M model; a GPU needs so much that the
# product takes longer than its start, which is alike in both formats.
_SHAPES = {"cpu": (512, 576, 1536), "cuda": (4096, 2048, 8192)}


@functools.cache
def speedup(device: str, threads: int) -> float:
    """Return time(float32) / time(bfloat16) of one product and its two gradients, best of seven.

    The two take turns, so that other work on the machine slows both alike.
    """
    del threads  # a key of the cache: the ratio depends on it
    tokens, inner, outer = _SHAPES.get(device, _SHAPES["cpu"])
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
