"""int8_quantize: the rows of a weight are quantized as tokens are, with a clip each."""

from __future__ import annotations

from torch import Tensor

from tailor_engine.kernels._tokens import PLAIN, config, prepare

__all__ = ["candidates", "config", "describe", "launch"]


def describe(weight: Tensor, clip: Tensor | None) -> tuple[int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    return (weight.shape[1],)


def candidates(width: int) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first."""
    first = config(width)
    warps = dict.fromkeys(
        (first["warps"], max(1, first["warps"] // 2), min(32, first["warps"] * 2))
    )
    return [{**first, "warps": count} for count in warps]


def launch(
    weight: Tensor, clip: Tensor | None, chosen: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize every row in one launch."""
    return prepare(weight, True, PLAIN, clip, chosen)
