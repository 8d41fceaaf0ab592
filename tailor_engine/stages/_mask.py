"""Which tokens of packed rows see which: handed over where transformers would ask the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def attention_mask(network: Any, positions: Tensor) -> Tensor | None:
    """Return the mask of rows whose documents start at position 0, or None: transformers makes it.

    Shapes: positions [B, L] -> [B, 1, L, L], true where a query sees a key.

    Without one, transformers asks the device in every forward pass whether rows are packed at all,
    and the host waits. On the CPU that costs nothing, and without a mask its attention is faster.
    Layers that see only a window need another mask, which transformers makes.
    """
    return of_documents(positions) if is_ours(network, positions.device.type) else None


def is_ours(network: Any, device: str) -> bool:
    """Say whether the mask is handed over."""
    config = network.config
    window = getattr(config, "sliding_window", None)
    return device != "cpu" and window is None and config._attn_implementation == "sdpa"


def of_documents(positions: Tensor) -> Tensor:
    """Let each token see its own document up to itself."""
    document = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]
