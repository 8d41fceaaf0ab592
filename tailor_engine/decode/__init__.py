"""A token through a whole quantized network in one native call.

`attach` gives a network a `forward` that takes this way for one token after a cache, which is what
`network.generate` asks for after the prompt, and transformers' own for everything else. `Decoder`
is the same without transformers around it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tailor_engine import families
from tailor_engine.decode._plan import Layer, Plan, Unsupported
from tailor_engine.errors import UserError
from tailor_engine.modules import QuantizedLinear
from tailor_engine.ops import int8_linear
from tailor_engine.ops._check import CODES
from tailor_engine.ops._op import threads

#: Weights of a block below which a second thread costs more than it brings.
SMALL_BLOCK = 400_000
#: What `forward` may be told beside its tensors, at these values.
_USUAL = {
    "return_dict": (True, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
}


def supported(network: Any) -> str | None:
    """Say why the native step does not cover a network; None where it does."""
    try:
        Plan(network, families.find(network.config))
    except (UserError, Unsupported) as error:
        return str(error)
    return None


def attach(network: Any) -> None:
    """Let a quantized network's `forward` use the native step."""
    if any(isinstance(module, QuantizedLinear) for module in network.modules()):
        network.forward = Forward(network)


class Forward:
    """The forward of a causal language model; arguments and results are transformers' own."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.stepper = Stepper(network)

    def __getstate__(self) -> dict[str, Any]:
        return {"network": self.network}  # a copy finds its own addresses

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["network"])  # type: ignore[misc]

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        **options: Any,
    ) -> Any:
        """Return logits and cache."""
        if (
            past_key_values is not None
            and input_ids is not None
            and input_ids.shape == (1, 1)
            and inputs_embeds is None
            and labels is None
            and use_cache is not False
            and all(v in _USUAL.get(name, (None,)) for name, v in options.items())
            and _is_plain(attention_mask, past_key_values)
            and self.stepper.open()
        ):
            place = None if position_ids is None else int(position_ids)
            logits = self.stepper.step(int(input_ids), past_key_values, place)
            if logits is not None:
                from transformers.modeling_outputs import CausalLMOutputWithPast

                logits = logits.view(1, 1, -1)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return type(self.network).forward(
            self.network,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **options,
        )


def _is_plain(mask: Any, cache: Any) -> bool:
    """Say whether a mask leaves nothing out: no padding, no form of somebody's own."""
    if mask is None:
        return True
    length = cache.get_seq_length() + 1
    return isinstance(mask, Tensor) and mask.shape == (1, length) and bool(mask.all())


class Stepper:
    """Runs the native step of one network, as long as the network is what was planned."""

    def __init__(self, network: Any) -> None:
        self.network = network
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
            or _native() is None
        ):
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
            if [id(getattr(layer, "room", None)) for layer in layers] != self._rooms or not all(
                layer.has_room() for layer in layers
            ):
                if not self._bind(layers):
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
            native, network = _native(), ctypes.addressof(plan.network)
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


def _native() -> Any:
    """Return the instruction-set level that our products run on; None where it is no C++."""
    level = int8_linear.choose("cpu")
    return int8_linear.implementation(level).args[0] if level.startswith("cpu.") else None


class Decoder:
    """Greedy decoding of one sequence, without transformers' loop around it.

    Raises:
        UserError: the native step does not cover the network.
    """

    def __init__(self, network: Any) -> None:
        self.network, self.stepper = network, Stepper(network)
        self.reset()
        with torch.inference_mode():
            if not self.stepper.open():
                raise UserError(f"no native step: {self.stepper.reason or 'see Stepper.open'}")

    def reset(self) -> None:
        """Forget all tokens."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.network.config)

    @torch.inference_mode()
    def prefill(self, ids: Iterable[int]) -> Tensor:
        """Read tokens and return the logits [V] that follow the last one."""
        output = self.network(
            torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1]

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Read one token and return the logits [V] that follow it."""
        if self.cache.get_seq_length() and self.stepper.open():
            logits = self.stepper.step(token, self.cache)
            if logits is not None:
                return logits
        return self.prefill([token])

    def generate(self, ids: Iterable[int], count: int, stop: Iterable[int] = ()) -> list[int]:
        """Return the most likely `count` tokens after a prompt, or up to the first of `stop`."""
        found, last = [], set(stop)
        logits = self.prefill(ids)
        while len(found) < count:
            found.append(int(logits.argmax()))
            if found[-1] in last:
                break
            if len(found) < count:
                logits = self.step(found[-1])
        return found
