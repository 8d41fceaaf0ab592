"""The native step of one network: planned once, pointed at a cache, run."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from tailor_engine import families
from tailor_engine.decode._plan import Layer, Plan, Unsupported
from tailor_engine.errors import UserError
from tailor_engine.ops import int8_linear
from tailor_engine.ops._check import CODES
from tailor_engine.ops._op import threads

#: Weights of a block below which a second thread costs more than it brings.
SMALL_BLOCK = 400_000


class _Replaced:
    """Counts the modules that take a place in some network."""

    count = 0

    @classmethod
    def note(cls, *_: Any) -> None:
        cls.count += 1


@functools.cache
def _watch_registrations() -> None:
    """Let torch tell of every module that takes a place, from the first network with a step on."""
    torch_modules.register_module_module_registration_hook(_Replaced.note)


class Stepper:
    """Runs the native step of one network, as long as the network is what was planned."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.native: Any = None  # the instruction-set level that runs it
        self.plan: Plan | None = None
        self.reason: str | None = None  # why there is no plan
        self._lock = threading.RLock()
        self._children: list[tuple[Any, tuple]] = []
        self._hooks: list[Any] = []
        self._marks: Any = None
        self._watched = False
        # The cache that the table names: its layers' ids, which only mean them with their count.
        self._layers: list[int] = []
        self._count: Any = None
        self._appended = 0
        self._workspace: dict[int, Tensor] = {}
        _watch_registrations()

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
        with self._lock:
            if self._marks_now() != self._marks:
                if not self._is_known():
                    self._look()
                self._watched = any(self._hooks)
                self._marks = None if self._watched else self._marks_now()
            return self.plan is not None and not self._watched

    def _marks_now(self) -> tuple[Any, ...]:
        """Return what cannot stay as it is where a module is replaced, moved or watched.

        To look at every module takes 0.2 ms: a step has driven them out of the caches.
        """
        plan = self.plan
        if plan is None:
            return _Replaced.count, RemovableHandle.next_id
        blocks, norm = tuple(plan.block_modules.values()), plan.final_norm.data_ptr()
        return _Replaced.count, RemovableHandle.next_id, blocks, norm

    def step(self, token: int, cache: Any, place: int | None = None) -> Tensor | None:
        """Return the logits [V] that follow a token, and append it to the cache.

        None, and nothing done, where the cache is not one that the step can write.
        """
        layers = getattr(cache, "layers", None)
        if not layers:
            return None
        with self._lock:
            plan = self.plan
            if plan is None or not (self._is_bound(layers) or self._bind(layers)):
                return None
            length = cache.get_seq_length()
            place = length if place is None else place
            if not 0 <= token < plan.network.embedding.features or not 0 <= place <= length:
                return None
            plan.reach(1 << max(8, place.bit_length()))
            count = threads() if plan.block_weights >= SMALL_BLOCK else 1
            native, network = self.native, ctypes.addressof(plan.network)
            if count not in self._workspace:
                size = native.decode_bytes(network, count)
                self._workspace = {count: torch.empty(size, dtype=torch.uint8)}
            logits = torch.empty(plan.network.head.features)
            self._appended += 1  # beyond the count if this is interrupted: the cache is bound anew
            native.decode_step(
                network, ctypes.addressof(self._table), CODES[torch.float32], token, place,
                self._workspace[count].data_ptr(), logits.data_ptr(), count,
            )  # fmt: skip
            self._count.appended = self._appended
        return logits

    def _is_known(self) -> bool:
        """Say whether the network has the modules and the memory that were last looked at."""
        if self.plan is None and self.reason is None:
            return False
        if self.plan is not None and not self.plan.is_current():
            return False
        return all(tuple(found.values()) == known for found, known in self._children)

    def _look(self) -> None:
        """Plan the step for the network as it is now, or note why not."""
        modules = list(self.network.modules())
        self._children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        everywhere = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks
        own = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks = [*everywhere, *own]
        self._layers, self._count, self._workspace = [], None, {}
        self.plan = self.reason = None
        if any(self._hooks):
            return  # they would see the tokens of the trial
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
        count = self._count
        if count is None:
            return False
        known = list(map(id, layers)) == self._layers
        counted = known and getattr(layers[0], "count", None) is count
        return counted and count.appended == self._appended < count.room

    def _bind(self, layers: list[Any]) -> bool:
        """Point the table at a cache's memory; False where it cannot be written."""
        from tailor_engine.decode import _cache

        plan = self.plan
        assert plan is not None
        if not plan.is_current():
            self._marks = None  # open() plans anew
            return False
        fits = len(layers) == len(plan.blocks)
        count = _cache.adopt(layers, torch.float32) if fits else None
        if count is None:
            return False
        self._table = (Layer * len(layers))()
        for row, layer, block, window in zip(
            self._table, layers, plan.blocks, plan.windows, strict=True
        ):
            _, _, groups, row.capacity, size = layer.room.shape
            if block.groups and (groups, size) != (block.groups, block.head_size):
                return False
            row.keys, row.values = (part.data_ptr() for part in layer.room)
            row.length, row.window = layer.filled, window
        self._layers, self._count, self._appended = list(map(id, layers)), count, 0
        return True


def kernels() -> Any:
    """Return the instruction-set level that our products run on; None where it is no C++."""
    level = int8_linear.choose("cpu")
    if not level.startswith("cpu."):
        return None
    run: Any = int8_linear.implementation(level)
    return run.args[0]
