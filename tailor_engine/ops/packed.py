"""One typed object for a quantized weight, on disk and on any backend."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tailor_engine.ops import _layout as layouts
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._check import CODES
from tailor_engine.ops._layout import GROUPS, LAYOUTS
from tailor_engine.ops._op import Op
from tailor_engine.ops.int4_dequantize import int4_dequantize
from tailor_engine.ops.int4_linear import int4_linear
from tailor_engine.ops.int4_quantize import int4_quantize
from tailor_engine.ops.int8_linear import int8_linear
from tailor_engine.ops.int8_quantize import int8_quantize

CLIP_RATIOS = tuple(round(1 - 0.04 * step, 2) for step in range(13))  # 1.00 down to 0.52
_CHUNK = 1 << 17  # values searched at once: two float32 buffers that stay in a 1 MiB cache


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in 4 or 8 bits: its codes, scales and zero points, and how they lie.

    A width that is no multiple of the group is padded with zeros inside; ``shape`` is the true one.
    """

    data: Tensor
    scale: Tensor
    """[N] float32 (8 bits) or [N, K/G] float16 (4 bits)."""
    zero: Tensor | None
    """[N, K/G] uint8, or None: 8 everywhere (4 bits), none (8 bits)."""
    shape: tuple[int, int]
    bits: int
    group: int
    """32, 64 or 128 (4 bits); 0 (8 bits: one scale a row)."""
    layout: str = "canonical"

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        bits: int,
        group: int = 0,
        symmetric: bool = True,
        clip: Tensor | None = None,
    ) -> PackedWeight:
        """Quantize a dense weight [N, K] by rounding to nearest.

        Shapes: clip (see :func:`search_clip`) [N] for 8 bits, [N, ceil(K/G)] for 4, or None.
        Raises: ValueError for other bits and groups.
        """
        check_bits(bits, group, symmetric)
        shape = (weight.shape[0], weight.shape[1])
        if bits == 8:
            data, scale = int8_quantize(weight, clip)
            return cls(data, scale, None, shape, 8, 0)
        data, scale, zero = int4_quantize(_padded(weight, group), group, symmetric, clip)
        return cls(data, scale, None if symmetric else zero, shape, 4, group)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> PackedWeight:
        """Rebuild a weight from :meth:`tensors` and :meth:`metadata`.

        Raises: ValueError where a tensor is missing or does not fit the rest.
        """
        absent = {"data", "scale"} - set(tensors)
        if absent:
            raise ValueError(f"packed weight: tensor {min(absent)!r} is missing")
        try:
            bits, group = int(metadata["bits"]), int(metadata["group"])
            rows, columns = (int(n) for n in metadata["shape"].split(","))
        except (KeyError, ValueError) as error:
            raise ValueError(f"packed weight: damaged metadata {dict(metadata)}") from error
        zero = tensors.get("zero")
        check_bits(bits, group, zero is None)
        packed = cls(tensors["data"], tensors["scale"], zero, (rows, columns), bits, group)
        packed._check_shapes()
        return packed

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, always in the canonical layout."""
        packed = self.to_layout("canonical")
        found = {"data": packed.data, "scale": packed.scale}
        return found if packed.zero is None else {**found, "zero": packed.zero}

    def metadata(self) -> dict[str, str]:
        """Return what the tensors alone do not tell, as strings."""
        rows, columns = self.shape
        return {"bits": str(self.bits), "group": str(self.group), "shape": f"{rows},{columns}"}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors as they lie in memory."""
        return sum(t.numel() * t.element_size() for t in self.held())

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the weight on a device; "cpu" panels go back to canonical elsewhere."""
        home = self if torch.device(device).type == "cpu" else self.to_layout("canonical")
        zero = None if home.zero is None else home.zero.to(device)
        return replace(home, data=home.data.to(device), scale=home.scale.to(device), zero=zero)

    def to_layout(self, layout: str) -> PackedWeight:
        """Return the weight in another layout; a pure permutation, bit for bit reversible."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if layout == self.layout:
            return self
        if layout == "cpu":
            data, reorder = layouts.to_panels(self.data, self.bits), layouts.groups_to_panels
        else:
            data = layouts.from_panels(self.data, self.bits, self.shape[0], self._width)
            reorder = layouts.groups_from_panels
        if self.bits == 8:
            return replace(self, data=data, layout=layout)
        zero = None if self.zero is None else reorder(self.zero)
        return replace(self, data=data, scale=reorder(self.scale), zero=zero, layout=layout)

    @classmethod
    def join(
        cls, weights: Sequence[PackedWeight]
    ) -> tuple[PackedWeight, list[PackedWeight]] | None:
        """Return one weight of all output features, and the given weights as views into it.

        One call then quantizes the input once and wakes the threads once; every feature comes out
        bit for bit as from its own weight. None where they cannot lie in one: of other kinds or
        widths, not in the "cpu" layout, or with a panel that is not full before the last one.
        """
        first, *rest = weights
        kind = (first.shape[1], first.bits, first.group, first.zero is None, first.data.device)
        if first.layout != "cpu" or any(
            (w.shape[1], w.bits, w.group, w.zero is None, w.data.device) != kind
            or w.layout != "cpu"
            for w in rest
        ):
            return None
        ends = [0, *itertools.accumulate(w.shape[0] for w in weights)]
        if any(end % layouts.PANEL for end in ends[:-1]):
            return None
        data = torch.cat([w.data for w in weights])
        scale = torch.cat([w.scale for w in weights])
        zeros = [w.zero for w in weights if w.zero is not None]
        zero = torch.cat(zeros) if zeros else None
        whole = replace(first, data=data, scale=scale, zero=zero, shape=(ends[-1], kind[0]))
        parts = [
            replace(
                whole,
                data=data[start // layouts.PANEL : -(-end // layouts.PANEL)],
                scale=scale[start:end],
                zero=None if zero is None else zero[start:end],
                shape=(end - start, kind[0]),
            )
            for start, end in itertools.pairwise(ends)
        ]
        return whole, parts

    def held(self) -> list[Tensor]:
        """Return all tensors as they lie in memory."""
        return [t for t in (self.data, self.scale, self.zero) if t is not None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight [N, K]."""
        packed = self.to_layout("canonical")
        if self.bits == 8:
            return (packed.data.float() * packed.scale[:, None]).to(dtype)
        dense = int4_dequantize(packed.data, packed.scale, packed.zero, self.group, dtype)
        return dense[:, : self.shape[1]]

    def linear(
        self, x: Tensor, bias: Tensor | None = None, quantize_activations: bool = True
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, [..., K] -> [..., N]; see int8_linear and int4_linear."""
        if x.dim() == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(f"x must have {self.shape[1]} columns, got shape {list(x.shape)}")
        linear: Op
        arguments: tuple[Any, ...]
        if self.bits == 8:
            linear = int8_linear
            arguments = x, self.data, self.scale, bias, self.layout, quantize_activations
        else:
            linear, x, held = (
                int4_linear,
                _padded(x, self.group),
                (self.data, self.scale, self.zero),
            )
            arguments = x, *held, bias, self.group, self.layout, quantize_activations
        if self._is_direct(x, bias):
            return linear.implementation(linear.choose("cpu"))(*arguments)
        return linear(*arguments)

    def _is_direct(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether a call may go to the kernel itself.

        Without gradients torch's dispatcher and the checks of a weight that is known to be right
        add 9 us to every call, of which a token makes hundreds; a small layer's kernel takes 2.
        """
        return (
            not torch.is_grad_enabled()
            and self.layout == "cpu"
            and type(x) is Tensor
            and x.is_cpu
            and x.dtype in CODES
            and (bias is None or (bias.is_cpu and bias.shape == self.scale.shape[:1]))
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return dense rows, ids [...] -> [..., K]: an embedding look-up."""
        flat = ids.reshape(-1)
        if self.layout == "canonical":
            data = self.data[flat]
        else:
            data = self.data[flat // layouts.PANEL, :, flat % layouts.PANEL]
        if self.bits == 8:
            codes = data.flatten(1)[:, : self.shape[1]]
            dense = (codes.float() * self.scale[flat, None]).to(dtype)
        else:
            if self.layout == "cpu":
                data = layouts.pack_nibbles(layouts.panel_codes(data))
            scale, zero = self._groups_of(self.scale, flat), self._groups_of(self.zero, flat)
            assert scale is not None
            dense = int4_dequantize(data, scale, zero, self.group, dtype)[:, : self.shape[1]]
        return dense.reshape(*ids.shape, self.shape[1])

    def _groups_of(self, values: Tensor | None, ids: Tensor) -> Tensor | None:
        if values is None or self.layout == "canonical":
            return None if values is None else values[ids]
        return layouts.group_rows_from_panels(values, ids)

    @property
    def _width(self) -> int:
        """K as it is stored: padded to whole groups."""
        return self.shape[1] + (-self.shape[1] % self.group if self.group else 0)

    def _check_shapes(self) -> None:
        features, width = self.shape[0], self._width
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if self.bits == 8:
            expected = {
                "data": ((features, width), torch.int8),
                "scale": ((features,), torch.float32),
            }
        else:
            groups = (features, width // self.group)
            expected = {
                "data": ((features, width // 2), torch.uint8),
                "scale": (groups, torch.float16),
                "zero": (groups, torch.uint8),
            }
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                raise ValueError(
                    f"packed weight: {name} must be {dtype} {list(shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )


def check_bits(bits: int, group: int, symmetric: bool) -> None:
    """Require a combination that the packers offer."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if bits == 8 and (group or not symmetric):
        raise ValueError("8 bits are symmetric with one scale a row (group 0)")
    if bits == 4 and group not in GROUPS:
        raise ValueError(
            f"group must be one of {', '.join(map(str, GROUPS))} for 4 bits, got {group}"
        )


def _padded(x: Tensor, group: int) -> Tensor:
    """Return x with zeros appended up to a whole group along its last dimension."""
    missing = -x.shape[-1] % group
    return functional.pad(x, (0, missing)) if missing else x


def search_clip(
    weight: Tensor,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    importance: Tensor | None = None,
    ratios: tuple[float, ...] = CLIP_RATIOS,
) -> Tensor:
    """Return the clip ratio of each group that gives the smallest squared error of the weight.

    Shapes: weight [N, K]; importance [K] (such as the mean square of each input feature) weighs
        the squares, None: all alike -> clip float32 [N] (8 bits) or [N, ceil(K/G)] (4 bits).
    Raises: ValueError for other bits, groups and an importance of another length.
    """
    check_bits(bits, group, symmetric)
    if importance is not None and importance.shape != (weight.shape[1],):
        raise ValueError(
            f"importance must have shape [{weight.shape[1]}], got {list(importance.shape)}"
        )
    size = group or weight.shape[1]
    scales = weight.new_tensor(ratios, dtype=torch.float32)
    found = []
    if importance is not None:
        importance = _padded(importance.float(), size).view(1, -1, size)
    for rows in weight.split(max(1, _CHUNK // max(1, weight.shape[1]))):
        groups = _padded(rows.float(), size).unflatten(1, (-1, size))
        low, high = rules.extremes(groups)
        errors, values = [], torch.empty_like(groups)
        floor: Any
        ceiling: Any
        for ratio in ratios:
            if bits == 8:
                scale, floor, ceiling = rules.int8_scale(low * ratio, high * ratio), -127, 127
            else:
                scale, zero = rules.int4_scale(low * ratio, high * ratio, symmetric)
                floor, ceiling = -zero, 15 - zero
            torch.div(groups, scale, out=values).round_().clamp_(floor, ceiling)
            values.mul_(scale).sub_(groups).square_()
            errors.append((values if importance is None else values.mul_(importance)).sum(-1))
        found.append(scales[torch.stack(errors).argmin(0)])
    clip = torch.cat(found)
    return clip[:, 0] if bits == 8 else clip
