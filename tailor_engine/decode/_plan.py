"""What the native step knows of a network: the structures of csrc/cpu/decode_network.h, filled."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine.families._family import PARTS, Family
from tailor_engine.modules import QuantizedEmbedding, QuantizedLinear

#: transformers' names of the gate's activation, as csrc/cpu/gated_activation.h counts them.
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
NORMS = (
    "attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm", "query_norm", "key_norm"
)  # fmt: skip
HALVES = {
    "attention": ("query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
}
#: Rotations whose angles follow from the place alone.
STATIC_ROPES = {"default", "linear", "llama3", "yarn"}


class Unsupported(Exception):
    """The native step does not cover a network; the message says why."""


_ADDRESS, _COUNT, _NUMBER = ctypes.c_uint64, ctypes.c_int64, ctypes.c_double


class Product(ctypes.Structure):
    """A packed weight."""

    _fields_ = [(name, _ADDRESS) for name in ("weight", "scale", "zero", "bias")] + [
        (name, _COUNT) for name in ("features", "width", "groups")
    ]


class Block(ctypes.Structure):
    """One transformer block."""

    _fields_ = [
        *((name, Product) for name in PARTS),
        *((name, _ADDRESS) for name in (*NORMS, "cosine", "sine")),
        *((name, _COUNT) for name in ("heads", "groups", "head_size")),
        ("scaling", _NUMBER),
    ]


class Layer(ctypes.Structure):
    """One block's keys and values."""

    _fields_ = [(name, _ADDRESS) for name in ("keys", "values")] + [
        (name, _COUNT) for name in ("capacity", "length", "window")
    ]


_SCALARS = ("embedding_scale", "epsilon", "norm_offset", "softcap", "attention_softcap")
_LARGEST = ("widest", "projected", "heads", "head_size", "scales")


class Network(ctypes.Structure):
    """What the blocks share."""

    _fields_ = [
        ("blocks", _ADDRESS),
        *((name, _COUNT) for name in ("count", "hidden", "activation")),
        *((name, Product) for name in ("embedding", "head")),
        ("final_norm", _ADDRESS),
        *((name, _NUMBER) for name in _SCALARS),
        *((name, _COUNT) for name in _LARGEST),
    ]


class Plan:
    """A network in the structures of the native step; holds the tensors whose addresses they name.

    Raises:
        Unsupported: the network is not of the shape that the step computes.
    """

    def __init__(self, network: Any, family: Family) -> None:
        self.held: list[Tensor] = []
        self.weights: list[tuple[Any, Any]] = []  # (module, its packed weight)
        self.floats: list[tuple[Any, str, int]] = []  # (module, name of a parameter, its address)
        config, blocks = network.config, family.blocks_of(network)
        self.body: Any = family.body_of(network)
        self.family = family
        self.blocks = (Block * len(blocks))()
        self.block_modules = blocks._modules
        self.windows: list[int] = []  # 0: none
        self.ropes: list[str | None] = []  # of each block: "", a layer type, or None: no rotation
        shared = Network(blocks=ctypes.addressof(self.blocks), count=len(blocks))
        shared.activation = self._activation(config)
        shared.embedding, shared.head = self._ends(network)
        shared.hidden = family.embedding_of(network).embedding_dim
        shared.embedding_scale = family.embedding_of(network).embed_scale
        shared.epsilon = self._epsilon(config)
        shared.norm_offset = family.norm_offset
        shared.softcap = family.softcap(config)
        if family.attention_softcap_key:
            shared.attention_softcap = getattr(config, family.attention_softcap_key, None) or 0.0
        final_norm = network.get_submodule(family.final_norm)
        self.final_norm = final_norm.weight
        shared.final_norm = self._floats(final_norm, "weight", "final norm")
        for index, block in enumerate(blocks):
            try:
                self._block(config, index, block)
            except Unsupported as error:
                raise Unsupported(f"block {index}: {error}") from None
        self._measure(shared)
        self.network = shared
        self.places = 0

    def _epsilon(self, config: Any) -> float:
        epsilon = getattr(config, "rms_norm_eps", None)
        if epsilon is None:
            raise Unsupported("its norms are not RMS norms")
        return float(epsilon)

    def _activation(self, config: Any) -> int:
        name = getattr(config, self.family.activation, None)
        if name not in ACTIVATIONS:
            raise Unsupported(f"its activation is {name}")
        return ACTIVATIONS[name]

    def _ends(self, network: Any) -> tuple[Product, Product]:
        embedding, head = self.family.embedding_of(network), self.family.head_of(network)
        if not isinstance(embedding, QuantizedEmbedding):
            raise Unsupported("its embedding is not quantized")
        if embedding.probe.dtype != torch.float32:
            raise Unsupported(f"it computes in {embedding.probe.dtype}")
        self.weights.append((embedding, embedding.packed))
        return self._packed(embedding.packed, "embedding"), self._product(head, "head")

    def _block(self, config: Any, index: int, block: nn.Module) -> None:
        family, native = self.family, self.blocks[index]
        for half, parts in HALVES.items():
            if family.has(block, half):
                for name in parts:
                    setattr(native, name, self._product(family.part(block, name), name))
        for name in NORMS:
            if getattr(family, name) and family.has(block, name):
                setattr(native, name, self._floats(family.part(block, name), "weight", name))
        kinds = getattr(config, "layer_types", None)
        kind = kinds[index] if kinds else "sliding_attention"
        if kind not in ("sliding_attention", "full_attention"):
            raise Unsupported(f"its attention is of type {kind}")
        sliding = kind == "sliding_attention"
        self.windows.append((getattr(config, "sliding_window", None) or 0) if sliding else 0)
        self.ropes.append(self._attention(block, native, kind))

    def _attention(self, block: nn.Module, native: Block, kind: str) -> str | None:
        if not self.family.has(block, "attention"):
            return None
        attention = self.family.part(block, "attention")
        if not getattr(attention, "is_causal", False):
            raise Unsupported("its attention is not causal")
        native.heads, native.groups = self.family.heads(block)
        native.head_size, native.scaling = attention.head_dim, attention.scaling
        if not getattr(attention, "use_rope", True):
            return None
        types = getattr(self.body.rotary_emb, "rope_type", None)
        of_kind = types.get(kind) if isinstance(types, dict) else types
        if of_kind not in STATIC_ROPES:
            raise Unsupported(f"its rotation is of type {of_kind}")
        return kind if isinstance(types, dict) else ""

    def _product(self, linear: Any, name: str) -> Product:
        if not isinstance(linear, QuantizedLinear):
            raise Unsupported(f"its {name} is not quantized")
        if not linear.quantize_activations:
            raise Unsupported(f"its {name} reads activations that are not quantized")
        self.weights.append((linear, linear.packed))
        product = self._packed(linear.packed, name)
        if linear.bias is not None:
            product.bias = self._floats(linear, "bias", f"bias of {name}")
        return product

    def _packed(self, packed: Any, name: str) -> Product:
        if packed.layout != "cpu" or not packed.data.is_cpu:
            raise Unsupported(f"its {name} is on {packed.data.device}")
        groups = packed.scale.shape[1] if packed.bits == 4 else 0
        width = groups * packed.group if groups else packed.shape[1]
        product = Product(features=packed.shape[0], width=width, groups=groups)
        product.weight, product.scale = self._hold(packed.data), self._hold(packed.scale)
        product.zero = 0 if packed.zero is None else self._hold(packed.zero)
        return product

    def _floats(self, module: Any, parameter: str, name: str) -> int:
        tensor = getattr(module, parameter)
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise Unsupported(f"its {name} is {tensor.dtype} on {tensor.device}")
        self.floats.append((module, parameter, tensor.data_ptr()))
        return self._hold(tensor)

    def is_current(self) -> bool:
        """Say whether all modules still have the weights whose addresses the structures name."""
        return all(module.packed is packed for module, packed in self.weights) and all(
            isinstance(tensor := getattr(module, name, None), Tensor)
            and tensor.data_ptr() == address
            for module, name, address in self.floats
        )

    def _hold(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous():
            raise Unsupported("a weight of it is not contiguous")
        self.held.append(tensor.detach())
        return tensor.data_ptr()

    def _products(self) -> Iterator[Product]:
        for block in self.blocks:
            yield from (product for name in PARTS if (product := getattr(block, name)).features)

    def _measure(self, shared: Network) -> None:
        """Write the sizes that the workspace must hold, and count the weights of a block."""
        products = [*self._products(), shared.head]
        widths = [max(p.width, p.features) for p in products[:-1]]
        widest = max([shared.hidden, shared.head.width, *widths])
        shared.widest = -(-widest // 64) * 64
        heads = [(b.heads, b.groups, b.head_size) for b in self.blocks]
        shared.projected = max((h + 2 * g) * size for h, g, size in heads)
        shared.heads = max(h for h, _, _ in heads)
        shared.head_size = max(size for _, _, size in heads)
        shared.scales = max(1, *(p.groups for p in products))
        self.block_weights = sum(p.width * p.features for p in products[:-1]) // len(self.blocks)

    @torch.no_grad()
    def reach(self, places: int) -> None:
        """Tabulate the angles of so many places, by the network's own rotation."""
        if places <= self.places:
            return
        positions = torch.arange(places)[None]
        like = torch.empty(1, places, 1)
        tables: dict[str, tuple[Tensor, Tensor]] = {}
        for block, kind in zip(self.blocks, self.ropes, strict=True):
            if kind is not None and kind not in tables:
                options = (kind,) if kind else ()
                cosine, sine = self.body.rotary_emb(like, positions, *options)
                if cosine.shape != (1, places, block.head_size):
                    raise Unsupported("it turns only a part of each head")
                tables[kind] = cosine.float().contiguous(), sine.float().contiguous()
        for block, kind in zip(self.blocks, self.ropes, strict=True):
            if kind is not None:
                block.cosine, block.sine = (table.data_ptr() for table in tables[kind])
        self.tables = list(itertools.chain.from_iterable(tables.values()))
        self.places = places
