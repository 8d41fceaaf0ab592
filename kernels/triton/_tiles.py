"""What the quantized products share: the choice of a tile, its place, and the end of its sums.

Tiles are [features, tokens], for the weight is the left operand: unpacked codes then stay in
registers, and its 64 features fill a warp group's instruction even beside 16 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import PROCESSORS, power_of_two, rounded_to

# Features, tokens, warps; the first that fills the card is taken. A larger tile unpacks and moves
# less for the same product: 128 x 256 asks shared memory for half of what 64 x 64 does.
TILES = ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (64, 32, 4), (64, 16, 4))
FILLED = 3 * PROCESSORS // 4  # 128 programs on 132 processors are a full card
PARTS = 8  # at most: the partial sums are written and read again
GROUPED = 8  # token tiles that run side by side and share what they read of the weight


def tiles(tokens: int, features: int, most: int = 256) -> list[dict[str, int]]:
    """Return the tiles worth a try, the chosen one first: they waste no tokens, and repeat little.

    A tile of fewer than 64 tokens unpacks the weight once more for each; only few tokens ask it.
    """
    rows = power_of_two(tokens, 16, most)
    fitting = [tile for tile in TILES if min(rows, 64) <= tile[1] <= rows]
    full = [tile for tile in fitting if _programs(tile, tokens, features) >= FILLED]
    order = [*full, *(tile for tile in reversed(fitting) if tile not in full)]
    return [{"block_n": n, "block_t": t, "warps": warps} for n, t, warps in order]


def parts(tile: dict[str, int], tokens: int, features: int, steps: int) -> int:
    """Return how many programs share the K axis of a tile, each with four steps at least.

    Eight warps a processor overlap loads, unpacking and products. Up to 32 tokens the weight's way
    from memory is all that counts, and 16 warps keep more of it under way.
    """
    warps = PROCESSORS * (16 if tile["block_t"] <= 32 else 8)
    shape = tile["block_n"], tile["block_t"], tile["warps"]
    missing = warps // (_programs(shape, tokens, features) * tile["warps"])
    wanted = min(missing, steps // 4, PARTS)
    return 1 << max(wanted.bit_length() - 1, 0)


def _programs(tile: tuple[int, int, int], tokens: int, features: int) -> int:
    return triton.cdiv(features, tile[0]) * triton.cdiv(tokens, tile[1])


def stages(step_bytes: int, capability: int, most: int) -> int:
    """Return how many steps of loads shared memory holds, of ``most``."""
    shared = (227 if capability >= 90 else 163 if capability == 80 else 99) << 10
    return max(1, min(most, (shared - 2048) // step_bytes))


@triton.jit
def tile_of(program, tokens, features, BT: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return (token tile, feature tile): GROUP token tiles by all features, then the next ones."""
    down, across = tl.cdiv(tokens, BT), tl.cdiv(features, BN)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def finished(
    total, token_scale, scale, bias, t, n, tokens, features,
    QUANTIZED: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return sums [N, T] in ACC, scaled by token and by feature, and with their bias."""
    total = total.to(ACC)
    if QUANTIZED:
        total *= tl.load(token_scale + t, mask=t < tokens, other=0).to(ACC)[None, :]
    if SCALED:
        total *= tl.load(scale + n, mask=n < features, other=0).to(ACC)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < features, other=0).to(ACC)[:, None]
    return total


@triton.jit
def sum_kernel(
    partial, token_scale, scale, bias, y, tokens, features, parts,
    QUANTIZED: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Add the partial sums [parts, T, N] of a tile in order, and finish them."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    inside = (n < features)[:, None] & (t < tokens)[None, :]
    place = t[None, :] * features + n[:, None]
    total = tl.zeros([BN, BT], partial.dtype.element_ty)
    for part in range(0, parts):
        step = tl.cast(part, tl.int64) * tokens * features
        total += tl.load(partial + step + place, mask=inside, other=0)
    total = finished(
        total, token_scale, scale, bias, t, n, tokens, features, QUANTIZED, SCALED, HAS_BIAS, ACC
    )
    tl.store(y + place, rounded_to(total, y.dtype.element_ty), mask=inside)


def partial_sums(parts: int, y: Tensor, tokens: int, features: int, sums: torch.dtype) -> Tensor:
    """Return where a product writes: y itself, or an array of partial sums."""
    if parts == 1:
        return y
    return torch.empty(parts, tokens, features, dtype=sums, device=y.device)


def add_parts(
    partial: Tensor,
    token_scale: Tensor,
    scale: Tensor,
    bias: Tensor,
    y: Tensor,
    **constants: object,
) -> None:
    """Add partial sums into y: 512 a program, 16 bytes an access (1024 spill 8 bytes)."""
    count, tokens, features = partial.shape
    grid = triton.cdiv(features, 128), triton.cdiv(tokens, 4)
    sum_kernel[grid](
        partial, token_scale, scale, bias, y, tokens, features, count,
        **constants, BN=128, BT=4, num_warps=4,
    )  # fmt: skip
