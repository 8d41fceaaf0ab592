"""Greedy decoding with a clock, and a network as it will be decoded: its matrices quantized."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailor_engine.families import Family
from tailor_engine.fused import fuse
from tailor_engine.modules import QuantizedEmbedding, QuantizedLinear
from tailor_engine.ops.packed import PackedWeight

GROUP = 32  # of int4, with zero points, and int8 at both ends: what the quantize stage does unasked
STEPS = 96  # tokens that are timed
FEW, SECONDS = 24, 1.5  # tokens that do where the others would take longer than that
#: The share of steps below the one that counts. Other work only slows down: with a second process
#: on the core the decile repeats within 1.5 %, and the median is now the one, now its double; on a
#: quiet core both repeat within 0.8 %.
UNDISTURBED = 0.1


def decode(network: Any, prompt: Tensor, count: int) -> Iterator[float]:
    """Decode greedily and yield the milliseconds that each token took, the prompt's first.

    Shapes: prompt [B, T].
    """
    cache, ids = None, prompt
    for _ in range(count):
        start = time.perf_counter()
        with torch.inference_mode():
            output = network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            ids.tolist()  # the tokens are known
        yield 1000 * (time.perf_counter() - start)


def step_milliseconds(networks: Mapping[str, Any], rows: int, context: int) -> dict[str, float]:
    """Return the time of a decode step of each network; they take turns.

    Numbers: milliseconds; `rows` requests at once, `context` tokens in the cache on average.
    """
    generator = torch.Generator().manual_seed(0)
    running: dict[str, Iterator[float]] = {}
    for name, network in networks.items():
        vocabulary = int(network.config.get_text_config().vocab_size)
        length = max(1, context - STEPS // 2)
        prompt = torch.randint(0, vocabulary, (rows, length), generator=generator)
        running[name] = decode(network, prompt.to(network.device), STEPS + 2)
    for steps in running.values():
        next(steps), next(steps)  # the prompt, and a first token that is colder than the others
    times: dict[str, list[float]] = {name: [] for name in running}
    end = time.perf_counter() + SECONDS
    for done in range(STEPS):
        if done >= FEW and time.perf_counter() > end:
            break
        for name, steps in running.items():
            times[name].append(next(steps))
    return {name: float(np.quantile(found, UNDISTURBED)) for name, found in times.items()}


def pack(weight: Tensor, bits: int) -> PackedWeight:
    """Round a weight [N, K] to nearest: speed does not depend on where the codes round to."""
    if bits == 8:
        return PackedWeight.quantize(weight.detach().float(), 8)
    return PackedWeight.quantize(weight.detach().float(), 4, GROUP, False)


def as_decoded(family: Family, network: Any, bits: int) -> Any:
    """Return a copy with weights of so many bits, to be timed.

    32 bits share the weights with the network; 16 are bfloat16.
    """
    shared: dict[int, Any] = {id(p): p for p in network.parameters()} if bits != 16 else {}
    timed = copy.deepcopy(network, shared)
    if bits == 16:
        return timed.to(torch.bfloat16)
    if bits < 16:
        linears: list[tuple[int, str, Any]] = list(family.linears(timed))
        for index, part, linear in linears:
            module = QuantizedLinear(pack(linear.weight, bits), linear.bias)
            family.blocks_of(timed)[index].set_submodule(getattr(family, part), module)
        _pack_ends(family, timed)
        fuse(timed, family)
    return timed


def _pack_ends(family: Family, network: Any) -> None:
    embedding, head = family.embedding_of(network), family.head_of(network)
    packed = pack(embedding.weight, 8)
    shared = packed if family.tied(network) else pack(head.weight, 8)
    network.set_submodule(family.embedding, QuantizedEmbedding.replacing(embedding, packed))
    bias = getattr(head, "bias", None)
    network.set_submodule(family.head, QuantizedLinear(shared, bias))
