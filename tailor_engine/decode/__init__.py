"""A token through a whole quantized network in one native call.

`attach` gives a network a `forward` that takes this way for one token after a cache, which is what
`network.generate` asks for after the prompt, and transformers' own for everything else. `Decoder`
is the same without transformers around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine import families
from tailor_engine.decode._memory import gather
from tailor_engine.decode._plan import Plan, Unsupported
from tailor_engine.decode._step import Stepper, kernels
from tailor_engine.errors import UserError
from tailor_engine.modules import QuantizedEmbedding, QuantizedLinear
from tailor_engine.ops.packed import PackedWeight

__all__ = ["Decoder", "attach", "kernels", "supported"]
#: What `forward` may be told beside its tensors, or else the config says, at these values.
_USUAL = {
    "return_dict": (True, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
}
_CLOSED = (
    "the network is in training mode, has hooks or runs under autocast, "
    "or its products do not run in C++ (TAILOR_BACKEND, tailor_engine.backend)"
)


def supported(network: Any) -> str | None:
    """Say why the native step does not cover a network; None where it does."""
    try:
        Plan(network, families.find(network.config))
    except (UserError, Unsupported) as error:
        return str(error)
    return None


def attach(network: Any) -> None:
    """Let a quantized network's `forward` use the native step; move its weights to one place."""
    packed = list(_packed(network))
    if packed:
        held = ((each.data, each.scale, each.zero) for each in packed)
        gather(tensor for tensors in held for tensor in tensors if tensor is not None)
        network.forward = Forward(network)


def _packed(network: Any) -> Iterator[PackedWeight]:
    """Yield the packed weights in the order in which a token reads them, joined ones as well."""
    family = families.find(network.config)
    linears: list[Any] = [linear for _, _, linear in family.linears(network)]
    for module in (*linears, family.head_of(network), family.embedding_of(network)):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and module.packed.data.is_cpu:
            yield module.packed
            fused: Any = getattr(module, "fused", None)
            if fused is not None:
                yield fused.whole


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
            and (position_ids is None or position_ids.numel() == 1)
            and use_cache is not False
            and self.stepper.open()
            and _is_usual(options, self.network.config)
            and _is_plain(attention_mask, past_key_values)
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


def _is_usual(options: dict[str, Any], config: Any) -> bool:
    """Say whether nothing is asked for but logits and cache."""
    asked = {name: getattr(config, name, None) for name in _USUAL} | options
    return all(value in _USUAL.get(name, (None,)) for name, value in asked.items())


def _is_plain(mask: Any, cache: Any) -> bool:
    """Say whether a mask leaves nothing out: no padding, no form of somebody's own."""
    if mask is None:
        return True
    length = cache.get_seq_length() + 1
    return isinstance(mask, Tensor) and mask.shape == (1, length) and bool(mask.all())


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
                raise UserError(f"no native step: {self.stepper.reason or _CLOSED}")

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
        """Return the most likely `count` tokens after a prompt, or up to the first of `stop`.

        The prompt goes on from what was read before; `reset` forgets it.
        """
        found: list[int] = []
        last = set(stop)
        logits = self.prefill(ids)
        while len(found) < count:
            found.append(int(logits.argmax()))
            if found[-1] in last:
                break
            if len(found) < count:
                logits = self.step(found[-1])
        return found
