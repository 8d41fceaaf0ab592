"""The native step of one network: planned once, pointed at a cache, run."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from tailor_engine import families
from tailor_engine.decode._plan import Layer, Plan, Unsupported
from tailor_engine.errors import UserError
from tailor_engine.ops import int8_linear
from tailor_engine.ops._check import CODES
from tailor_engine.ops._op import threads

#: Weights of a block below which a second thread costs more than it brings.
SMALL_BLOCK = 400_000


class Stepper:
    """Runs the native step of one network, as long as the network is what was planned."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.native: Any = None  # the instruction-set level that runs it
        self.plan: Plan | None = None
        self.reason: str | None = None  # why there is no plan
        self._lock = threading.Lock()
        self._children: list[tuple[Any, tuple]] = []
        self._hooks: list[Any] = []
        self._rooms: list[int] = []
        self._workspace: dict[int, Tensor] = {}

    def open(self) -> bool:
        """Say whether the step may answer now: nothing records, watches or replaces a module."""
        network = self.network
        if (
            torch.is_grad_enabled()
            or network.training
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or torch._C._get_tracing_state() is not None
        ):
            return False
        self.native = kernels()
        if self.native is None:
            return False
        if not self._is_known():
            self._look()
        return self.plan is not None and not any(self._hooks)

    def step(self, token: int, cache: Any, place: int | None = None) -> Tensor | None:
        """Return the logits [V] that follow a token, and append it to the cache.

        None, and nothing done, where the cache is not one that the step can write.
        """
        plan, layers = self.plan, cache.layers
        assert plan is not None
        with self._lock:
            if not (self._is_bound(layers) or self._bind(layers)):
                return None
            if place is None:
                place = cache.get_seq_length()
            if not 0 <= token < plan.network.embedding.features or place < 0:
                return None
            plan.reach(1 << max(8, place.bit_length()))
            for row, layer, window in zip(self._rows, layers, plan.windows, strict=True):
                row.length = layer.filled
                row.first = max(0, layer.filled + 1 - window) if window else 0
            count = threads() if plan.block_weights >= SMALL_BLOCK else 1
            native, network = self.native, ctypes.addressof(plan.network)
            if count not in self._workspace:
                size = native.decode_bytes(network, count)
                self._workspace = {count: torch.empty(size, dtype=torch.uint8)}
            logits = torch.empty(plan.network.head.features)
            native.decode_step(
                network, ctypes.addressof(self._table), CODES[torch.float32], token, place,
                self._workspace[count].data_ptr(), logits.data_ptr(), count,
            )  # fmt: skip
            for layer in layers:
                layer.appended()
        return logits

    def _is_known(self) -> bool:
        """Say whether the network has the modules and the memory that were last looked at."""
        if self.plan is None and self.reason is None:
            return False
        if (
            self.plan is not None
            and self.plan.final_norm.data_ptr() != self.plan.network.final_norm
        ):
            return False
        return all(tuple(found.values()) == known for found, known in self._children)

    def _look(self) -> None:
        """Plan the step for the network as it is now, or note why not."""
        modules = list(self.network.modules())
        self._children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._rooms, self._workspace = [], {}
        self.plan = self.reason = None
        try:
            self.plan = Plan(self.network, families.find(self.network.config))
            self._try()
        except (UserError, Unsupported) as error:
            self.plan, self.reason = None, str(error)

    def _try(self) -> None:
        """Require that two tokens after two others come out as from the network's own forward."""
        from transformers import DynamicCache

        forward, config = type(self.network).forward, self.network.config
        ids = torch.arange(4)[None] % self.network.get_input_embeddings().num_embeddings
        own, ours = DynamicCache(config=config), DynamicCache(config=config)
        for cache in (own, ours):
            forward(self.network, ids[:, :2], past_key_values=cache, use_cache=True)
        for token in ids[0, 2:]:
            output = forward(self.network, token.view(1, 1), past_key_values=own, use_cache=True)
            expected, found = output.logits.flatten().float(), self.step(int(token), ours)
            # Codes at a boundary round either way: 1 %. Another formula is off by half.
            if found is None or not (found - expected).norm() < 0.1 * expected.norm():
                raise Unsupported("its own forward answers otherwise")

    def _is_bound(self, layers: list[Any]) -> bool:
        """Say whether the table names a cache's memory, with room for another token."""
        rooms = [id(getattr(layer, "room", None)) for layer in layers]
        return rooms == self._rooms and all(layer.has_room() for layer in layers)

    def _bind(self, layers: list[Any]) -> bool:
        """Point the table at a cache's memory; False where it cannot be written."""
        from tailor_engine.decode import _cache

        plan = self.plan
        assert plan is not None
        fits = len(layers) == len(plan.blocks) and all(
            module.packed is packed for module, packed in plan.weights
        )
        if not fits or not _cache.adopt(layers, torch.float32):
            return False
        self._table = (Layer * len(layers))()
        self._rows = list(self._table)
        for row, layer, block in zip(self._rows, layers, plan.blocks, strict=True):
            _, _, groups, row.capacity, size = layer.room.shape
            if block.groups and (groups, size) != (block.groups, block.head_size):
                return False
            row.keys, row.values = (part.data_ptr() for part in layer.room)
        self._rooms = [id(layer.room) for layer in layers]
        self._held = [layer.room for layer in layers]  # an id is unique while its object lives
        return True


def kernels() -> Any:
    """Return the instruction-set level that our products run on; None where it is no C++."""
    level = int8_linear.choose("cpu")
    if not level.startswith("cpu."):
        return None
    run: Any = int8_linear.implementation(level)
    return run.args[0]
