"""How a quantized weight lies in memory: "canonical" on disk, "cpu" as C++ and CUDA read it.

canonical  int8 [N, K]; int4 [N, K/2] bytes, even k in the low nibble, odd k in the high one.
cpu        panels of 16 output features, one sequential stream each, for every level of the CPU:
           int8 [N/16, K/4, 16, 4]: the four k of one dot-product instruction lie together.
           int4 [N/16, K/8, 16, 4] bytes: low nibbles k 0..3 of eight, high nibbles k 4..7.
           N is padded with zeros to 16, K (int8) to 8.
           For CUDA, 16 bytes are a thread's operands of a tensor core: csrc/cuda/small_batch.cuh.
Scales and zero points of int4 keep their shape [N, K/G] and lie panel by panel as [K/G][16]; the
last panel, of N % 16 features, as [K/G][N % 16]. So every shape is still told by the tensors alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PANEL = 16  # output features of a panel: one 512-bit vector of int32 sums, two 256-bit ones
LAYOUTS = ("canonical", "cpu")
GROUPS = (32, 64, 128)


def unpack_nibbles(data: Tensor) -> Tensor:
    """Return the codes [..., 2n] of bytes [..., n], the low nibble first."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return bytes [..., n] of codes [..., 2n], even positions in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def to_panels(data: Tensor, bits: int) -> Tensor:
    """Return canonical data in the "cpu" layout."""
    features = data.shape[0]
    if bits == 8:
        padded = functional.pad(data, (0, -data.shape[1] % 8, 0, -features % PANEL))
        return padded.unflatten(1, (-1, 4)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    padded = functional.pad(data, (0, 0, 0, -features % PANEL))
    eights = unpack_nibbles(padded).unflatten(1, (-1, 2, 4))
    joined = eights[:, :, 0] | eights[:, :, 1] << 4
    return joined.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def from_panels(data: Tensor, bits: int, features: int, width: int) -> Tensor:
    """Return "cpu" data in the canonical layout of N = features and K = width."""
    rows = data.transpose(1, 2).flatten(0, 1)[:features]
    if bits == 8:
        return rows.flatten(1)[:, :width].contiguous()
    return pack_nibbles(panel_codes(rows))


def panel_codes(rows: Tensor) -> Tensor:
    """Return the int4 codes [n, K] of rows [n, K/8, 4] taken out of panels."""
    return torch.stack((rows & 15, rows >> 4), 2).flatten(1)


def groups_to_panels(values: Tensor) -> Tensor:
    """Return scales or zero points [N, K/G] in the order of the "cpu" layout."""
    features = values.shape[0]
    full = features - features % PANEL
    body = values[:full].unflatten(0, (-1, PANEL)).transpose(1, 2).reshape(-1)
    tail = values[full:].t().reshape(-1)
    return torch.cat((body, tail)).view(values.shape)


def groups_from_panels(values: Tensor) -> Tensor:
    """Undo :func:`groups_to_panels`."""
    features, groups = values.shape
    full = features - features % PANEL
    flat = values.reshape(-1)
    body = flat[: full * groups].view(-1, groups, PANEL).transpose(1, 2).reshape(full, groups)
    tail = flat[full * groups :].view(groups, features - full).t()
    return torch.cat((body, tail))


def group_rows_from_panels(values: Tensor, ids: Tensor) -> Tensor:
    """Return rows ``ids`` [n] of scales or zero points that lie in the "cpu" order: [n, K/G]."""
    features, groups = values.shape
    panel = ids // PANEL
    width = (features - panel * PANEL).clamp(max=PANEL)
    start = panel * (PANEL * groups) + ids % PANEL
    steps = torch.arange(groups, device=ids.device)
    return values.reshape(-1)[start[:, None] + steps * width[:, None]]
