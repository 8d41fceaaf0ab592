"""Where the microseconds of a decode step go: a clock around every part of a network.

Each part is charged with its own time, without that of the parts inside it; what calls and the
clocks themselves cost falls to the part around. The sum is compared with a step without clocks.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch

import tailor_engine
from tailor_engine import families
from tailor_engine.ops import OPS

from . import engines
from .decode import CONTEXT

TOKENS = 64
KERNELS = {
    "int4_linear": "linear layers, kernel",
    "int8_linear": "linear layers, kernel",
    "rms_norm": "norms, kernel",
    "gated_activation": "gate, kernel",
    "rotary": "rotation, kernel",
    "causal_attention": "attention, kernel",
    "int4_dequantize": "embedding, kernel",
}


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
    replace(network, "forward", "network, Python")
    replace(family.body_of(network), "forward", "mask, positions, outputs")
    replace(family.embedding_of(network), "forward", "embedding")
    for name, module in network.named_modules():
        if hasattr(module, "packed") and module is not family.embedding_of(network):
            replace(module, "forward", "linear layers, Python")
        elif "norm" in name.rpartition(".")[2]:
            replace(module, "forward", "norms, Python")
        elif name.endswith("rotary_emb"):
            replace(module, "forward", "rotary angles")
    for block in family.blocks_of(network):
        replace(block, "forward", "blocks, Python and residual sums")
        replace(family.part(block, "attention"), "forward", "attention, Python and views")
        replace(family.part(block, "mlp"), "forward", "feed-forward, Python")
    table, kind = modeling_utils.ALL_ATTENTION_FUNCTIONS, network.config._attn_implementation
    undo.callback(table.__setitem__, kind, table[kind])
    table[kind] = clock.around("attention, torch's", table[kind])
    replace(cache_utils.DynamicLayer, "update", "KV cache, torch.cat")
    for name, label in KERNELS.items():
        level = OPS[name].choose()
        if level != "reference":
            replace(OPS[name].implementation(level).args[0], name, label)
    with undo:
        yield


def profile(engine, ids, tokens):
    """Return (plain step in us, clocked step in us, [(part, us a step, calls a step)])."""
    engine.prefill(ids)
    plain = statistics.median(1000 * engines.milliseconds(engine.step) for _ in range(tokens))
    clock = Clock()
    engine.prefill(ids)
    engine._run = clock.around("loop, argmax", engine._run)
    with clocked(engine.network, clock):
        total = statistics.mean(1000 * engines.milliseconds(engine.step) for _ in range(tokens))
    del engine._run
    parts = [
        (label, 1e6 * seconds / tokens, clock.calls[label] / tokens)
        for label, seconds in clock.seconds.most_common()
    ]
    return plain, total, parts


def measure(path, thread_counts):
    """Append one row a network and thread count: the parts of a decode step."""
    model = tailor_engine.load(engines.SOURCE)
    ids = engines.prompt(model, CONTEXT)
    with engines.temporary() as folder:
        made, _ = engines.engines(model, folder, ("tailor int4", "transformers fp32"))
        for threads, (name, engine) in itertools.product(thread_counts, made.items()):
            torch.set_num_threads(threads)
            plain, total, parts = profile(engine, ids, TOKENS)
            row = {"engine": name, "threads": threads, "us": plain, "us_with_clocks": total}
            engines.record([row | {"parts": parts}], "decode-profile", path)


def page(rows):
    """Return the page as Markdown: one table a network and thread count."""
    machine = rows[0]["machine"]
    text = (
        "# A decode step, part by part\n\n"
        "Written by `python -m benchmarks.decode_profile`. SmolLM2-135M, one request, a prompt of "
        f"{CONTEXT} tokens, medians and means of {TOKENS} steps on {machine['processor']} "
        f"({', '.join(machine['levels'])}), torch {machine['torch']}. Each part is charged with "
        "its own time, without that of the parts inside it; 'kernel' is the time inside our C++, "
        "the rest is Python, torch's small ops, and the clocks' own cost.\n"
    )
    for row in rows:
        kernels = sum(us for label, us, _ in row["parts"] if label.endswith("kernel"))
        text += (
            f"\n## {row['engine']}, threads: {row['threads']}\n\n"
            f"A step takes {row['us']:.0f} us, {row['us_with_clocks']:.0f} us with the clocks; of "
            f"these our kernels take {kernels:.0f} us: what a native step could at most come down "
            "to, without better kernels.\n\n"
            "| part | us a step | calls | us a call | share |\n|---|---|---|---|---|\n"
        )
        for label, us, calls in row["parts"]:
            share = us / row["us_with_clocks"]
            text += f"| {label} | {us:.0f} | {calls:.0f} | {us / calls:.1f} | {share:.0%} |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="to measure with")
    parser.add_argument("--json", metavar="FILE", help="append here, not in benchmarks/results")
    arguments = parser.parse_args()
    path = Path(arguments.json or engines.default_path("decode-profile"))
    measure(path, arguments.threads)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    newest = {(row["engine"], row["threads"]): row for row in rows}
    (Path(__file__).parent / "decode.md").write_text(page(list(newest.values())))


if __name__ == "__main__":
    main()
