"""Where the microseconds of a decode step go: a clock around every part of a network.

Each part is charged with its own time, without that of the parts inside it; what calls and the
clocks themselves cost falls to the part around. The sum is compared with a step without clocks.
"""

import contextlib
import functools
import statistics
import time
from collections import Counter

import torch

from tailor_engine import families
from tailor_engine.ops import OPS


class Clock:
    """Self times by label; calls may nest."""

    def __init__(self):
        self.seconds, self.calls, self.inner = Counter(), Counter(), [0.0]

    def around(self, label, function):
        """Return the function with its time charged to the label."""

        @functools.wraps(function)
        def timed(*arguments, **options):
            start = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                spent = time.perf_counter() - start
                self.seconds[label] += spent - self.inner.pop()
                self.calls[label] += 1
                self.inner[-1] += spent

        return timed


@contextlib.contextmanager
def clocked(network, clock):
    """Put the clock around a network's modules, its attention, its cache and our kernels."""
    from transformers import cache_utils, modeling_utils

    undo = contextlib.ExitStack()

    def replace(owner, name, label):
        before, own = getattr(owner, name), name in vars(owner)
        setattr(owner, name, clock.around(label, before))
        undo.callback(setattr, owner, name, before) if own else undo.callback(delattr, owner, name)

    family = families.find(network.config)
    replace(network, "forward", "head's inputs and outputs")
    replace(family.body_of(network), "forward", "mask, positions, outputs")
    replace(family.embedding_of(network), "forward", "embedding")
    for name, module in network.named_modules():
        if hasattr(module, "packed") and module is not family.embedding_of(network):
            replace(module, "forward", "linear layers: Python around our kernels")
        elif "norm" in name.rpartition(".")[2]:
            replace(module, "forward", "RMSNorm")
        elif name.endswith("rotary_emb"):
            replace(module, "forward", "rotary angles")
    for block in family.blocks_of(network):
        replace(block, "forward", "residual additions, calls of modules")
        replace(family.part(block, "attention"), "forward", "rotation, views of heads")
        replace(family.part(block, "mlp"), "forward", "gate: activation and product")
    table = modeling_utils.ALL_ATTENTION_FUNCTIONS
    kind = network.config._attn_implementation
    before = table[kind]
    table[kind] = clock.around("attention", before)
    undo.callback(table.__setitem__, kind, before)
    replace(cache_utils.DynamicLayer, "update", "KV cache")
    for level in {op.choose() for op in OPS.values()} - {"reference"}:
        native = OPS["int4_linear"].implementation(level).args[0]
        for name in OPS:
            if "linear" in name and hasattr(native, name):
                replace(native, name, "linear layers: our kernels")
    with undo:
        yield


def profile(engine, ids, tokens):
    """Return (plain step in us, clocked step in us, [(label, us a step, calls a step)])."""

    def step():
        start = time.perf_counter()
        engine.step()
        return 1e6 * (time.perf_counter() - start)

    engine.prefill(ids)
    plain = statistics.median([step() for _ in range(tokens)])
    clock = Clock()
    engine.prefill(ids)
    engine._run = clock.around("argmax, loop", engine._run)
    with clocked(engine.network, clock), torch.inference_mode():
        total = [step() for _ in range(tokens)]
    del engine._run
    parts = [
        (label, 1e6 * seconds / tokens, clock.calls[label] / tokens)
        for label, seconds in clock.seconds.most_common()
    ]
    return plain, statistics.mean(total), parts
