"""Which number format a device is fast at: decided by a measurement, never by the device's name."""

from __future__ import annotations

from typing import Any

import torch

from tailor_engine.ops._bfloat16 import speedup as bfloat16_speedup
from tailor_engine.stages._stage import context

#: bfloat16 must win by this much before it is worth its rounding: autocast adds casts of weights
#: and gradients that a bare product does not show.
WORTH = 1.5


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
