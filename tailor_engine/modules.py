"""Linear and embedding layers on packed weights: what the quantize stage puts into a network."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tailor_engine.ops.int4_linear import int4_linear
from tailor_engine.ops.packed import PackedWeight

#: packed weight -> {device: weak reference to its placed form}. Keeps what two modules share (tied
#: embedding and head) one object when each of them is placed or moved by itself.
_PLACED: Any = WeakIdKeyDictionary()


def place(packed: PackedWeight, device: torch.device) -> PackedWeight:
    """Return the weight on a device, in the layout that is read fastest there.

    The same weight and device give the same object for as long as somebody holds it.
    """
    panels = device.type == "cpu" or not int4_linear.missing("cuda", device.type)
    layout = "cpu" if panels else "canonical"
    if packed.data.device == device and packed.layout == layout:
        return packed
    known = _PLACED.setdefault(packed, {})
    reference = known.get(device)
    placed = reference() if reference is not None else None
    if placed is None:
        placed = packed.to(device).to_layout(layout)
        known[device] = weakref.ref(placed)
    return placed


class _Quantized(nn.Module):
    """What both share: the weight follows the module to a device, and never changes its dtype."""

    packed: PackedWeight
    probe: Tensor

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = place(packed, packed.data.device)
        # Follows `.to(...)` as any buffer: tells the device for `packed` and the output's dtype.
        probe = torch.empty(0, dtype=dtype, device=packed.data.device)
        self.register_buffer("probe", probe, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.probe.device != self.packed.data.device:
            self.packed = place(self.packed, self.probe.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.packed.tensors().items():
            destination[prefix + name] = tensor


class QuantizedLinear(_Quantized):
    """A linear layer whose weight is packed; runs on int8_linear or int4_linear.

    Shapes: [..., K] -> [..., N] in the input's dtype.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        quantize_activations: bool = True,
    ) -> None:
        super().__init__(packed, torch.float32 if bias is None else bias.dtype)
        self.out_features, self.in_features = packed.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.quantize_activations = quantize_activations
        self.fused: FusedLinears | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias."""
        if self.fused is not None and not (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):
            return self.fused.linear(self, x)
        return self.packed.linear(x, self.bias, self.quantize_activations)

    def extra_repr(self) -> str:
        """Describe the layer in the network's printout."""
        return f"{self.in_features}, {self.out_features}, {_describe(self.packed)}"


class FusedLinears:
    """Quantized linears that read the same tensor, computed together by the first one called.

    Model code calls q, k and v (or gate and up) one after the other with one input. The first call
    multiplies it by all their weights at once (PackedWeight.join); the others find their columns
    ready. `FusedLinears.of([block.q, block.k, block.v])` is all that a loader does: the modules,
    their names, state dict and files stay as they are, and so does every bit of the outputs. It
    acts where no gradients are recorded; elsewhere each linear runs by itself.

    An input counts as the same when it is the same object and nobody has written into it. Tensors
    of inference_mode do not count their writes: there, model code must not overwrite the input
    between the calls (none of the families does).
    """

    def __init__(self, linears: Sequence[QuantizedLinear], whole: PackedWeight) -> None:
        self.linears, self.whole = list(linears), whole
        self.packed = [linear.packed for linear in linears]
        self.sizes = [packed.shape[0] for packed in self.packed]
        self._ready: tuple[Tensor, int, dict[int, Tensor]] | None = None

    @classmethod
    def of(cls, linears: Sequence[QuantizedLinear]) -> FusedLinears | None:
        """Fuse linears of one input, or return None and leave them as they are.

        Their weights must be of one kind (PackedWeight.join), all with a bias or all without.
        """
        biases = [linear.bias is None for linear in linears]
        joined = PackedWeight.join([linear.packed for linear in linears])
        exact = any(not linear.quantize_activations for linear in linears)
        if joined is None or exact or any(biases) != all(biases):
            return None
        whole, parts = joined
        for linear, part in zip(linears, parts, strict=True):
            linear.packed = part
        fused = cls(linears, whole)
        for linear in linears:
            linear.fused = fused
        return fused

    def all(self, x: Tensor) -> Sequence[Tensor] | None:
        """Return the outputs of all linears, or None where one of them has changed since."""
        if any(each.packed is not own for each, own in zip(self.linears, self.packed, strict=True)):
            return None  # moved to another device, or given another weight
        biases: list[Tensor] = [each.bias for each in self.linears if each.bias is not None]
        bias = torch.cat(biases) if biases else None
        return self.whole.linear(x, bias).split_with_sizes(self.sizes, -1)

    def linear(self, linear: QuantizedLinear, x: Tensor) -> Tensor:
        """Return the output of one of the linears."""
        position = next(i for i, each in enumerate(self.linears) if each is linear)
        version = -1 if x.is_inference() else x._version
        ready = self._ready
        if ready is not None and ready[0] is x and ready[1] == version:
            found = ready[2].pop(position, None)  # handed out once: it is the caller's to write to
            if not ready[2]:
                self._ready = None
            if found is not None:
                return found
        columns = self.all(x)
        if columns is None:
            linear.fused = None
            return linear(x)
        outputs = dict(enumerate(columns))
        result = outputs.pop(position)
        self._ready = x, version, outputs
        return result


class QuantizedEmbedding(_Quantized):
    """An embedding table whose rows are packed and dequantized when they are looked up.

    Shapes: ids [...] -> [..., D]. `embed_scale` multiplies the rows, as Gemma's embeddings do.
    """

    def __init__(
        self,
        packed: PackedWeight,
        dtype: torch.dtype = torch.float32,
        embed_scale: float = 1.0,
    ) -> None:
        super().__init__(packed, dtype)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.embed_scale = embed_scale

    @classmethod
    def replacing(cls, embedding: nn.Module, packed: PackedWeight) -> QuantizedEmbedding:
        """Return the packed form of an embedding, with its output dtype and its scale."""
        scale = getattr(embedding, "scalar_embed_scale", 1.0)
        return cls(packed, embedding.get_parameter("weight").dtype, float(scale))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows of these ids."""
        rows = self.packed.rows(input_ids, self.probe.dtype)
        if self.embed_scale == 1.0:
            return rows
        return rows * torch.tensor(self.embed_scale, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        """Describe the layer in the network's printout."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {_describe(self.packed)}"


def _describe(packed: PackedWeight) -> str:
    group = f", group={packed.group}" if packed.group else ""
    return f"bits={packed.bits}{group}, layout={packed.layout}"
