"""Where the time of a decode step and of a prompt goes: a clock around every part of a network.

Three ways through the same weights: as they are loaded, where one native call is a token; by the
network's modules, fused (tailor_engine/fused.py); and by every module's own forward.
Each part is charged with its own time, without that of the parts inside it; what calls and the
clocks themselves cost falls to the part around. The sum is compared with a step without clocks.
"""

import argparse
import contextlib
import copy
import functools
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch

import tailor_engine
from tailor_engine import families
from tailor_engine.decode import kernels
from tailor_engine.ops import OPS

from . import ceilings, engines
from .decode import CONTEXT

PAGE = Path(__file__).parent / "decode.md"
TOKENS, STEPS = 512, 48
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
    if hasattr(network.forward, "stepper"):
        replace(network.forward.stepper, "step", "native step, Python")
        replace(kernels(), "decode_step", "native step, kernel")
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


def profile(engine, run, count):
    """Return (plain ms, ms with clocks, [(part, ms, calls)]), each of one call of `run`."""
    plain = statistics.median(engines.milliseconds(run) for _ in range(count))
    clock = Clock()
    engine._run = clock.around("loop, argmax", engine._run)
    with clocked(engine.network, clock):
        total = statistics.mean(engines.milliseconds(run) for _ in range(count))
    del engine._run
    parts = [
        (label, 1e3 * seconds / count, clock.calls[label] / count)
        for label, seconds in clock.seconds.most_common()
    ]
    return plain, total, parts


def by_modules(network):
    """Return a copy that takes every token through its modules."""
    network = copy.deepcopy(network)
    vars(network).pop("forward", None)
    return network


def unfused(network):
    """Return a copy whose modules run their own forward, each linear by itself."""
    network = by_modules(network)
    for module in network.modules():
        vars(module).pop("forward", None)
        if hasattr(module, "fused"):
            module.fused = None
    return network


def measure(path, threads):
    """Append rows: the parts of a decode step and of a prompt, each of three ways."""
    level = OPS["int8_linear"].choose()
    bandwidth = ceilings.measure(level, threads, quick=True).rates[threads]["read"]
    torch.set_num_threads(threads)
    model = tailor_engine.load(engines.SOURCE)
    ids = engines.prompt(model, TOKENS)
    with engines.temporary() as folder:
        made, _ = engines.engines(model, folder, ("tailor int4",))
    ours = made["tailor int4"]
    floor = {"weights_mb": model.replace(network=ours.network).size_bytes / 1e6}
    floor["read_gbps"] = bandwidth
    networks = {"as loaded": ours}
    for change in (by_modules, unfused):
        networks[change.__name__.replace("_", " ")] = engines.TorchEngine(change(ours.network))
    for name, engine in networks.items():
        engine.prefill(ids[:CONTEXT])
        found = {f"a token after {CONTEXT}": profile(engine, engine.step, STEPS)}
        whole = functools.partial(engine.prefill, ids)
        found[f"a prompt of {TOKENS}"] = profile(engine, whole, 4)
        rows = [
            {"what": what, "network": name, "threads": threads, "ms": plain,
             "ms_with_clocks": total, "parts": parts} | floor
            for what, (plain, total, parts) in found.items()
        ]  # fmt: skip
        engines.record(rows, "decode-profile", path)


def page(rows):
    """Return the page as Markdown: for each task one table, a column for each way."""
    machine, floor = rows[0]["machine"], rows[0]
    least = floor["weights_mb"] / floor["read_gbps"]
    text = (
        "# A decode step and a prompt, part by part\n\n"
        "Written by `python -m benchmarks.decode_profile` from its results file. SmolLM2-135M in "
        f"int4 on {machine['processor']} ({', '.join(machine['levels'])}), torch "
        f"{machine['torch']}. Each part is charged with its own time, without that of the parts "
        "inside it: 'kernel' is the time inside our C++; the rest is Python, torch's small ops, "
        "and what the clocks themselves cost. 'As loaded', a token is one native call "
        "(tailor_engine/decode); 'by modules' the same weights without it; 'unfused' with every "
        "module's own forward.\n\n"
        f"A token reads all weights, {floor['weights_mb']:.0f} MB: {least:.2f} ms at the "
        f"{floor['read_gbps']:.0f} GB/s that this machine read from memory "
        f"(threads: {floor['threads']}). No step is faster.\n"
    )
    tasks = dict.fromkeys((row["what"], row["threads"]) for row in rows)
    for what, threads in tasks:
        known = [r for r in rows if (r["what"], r["threads"]) == (what, threads)]
        text += f"\n## {what}, threads: {threads}\n\n"
        text += "".join(f"| {name} " for name in ["part", *(r["network"] for r in known)])
        text += "|\n|---" + "|---" * len(known) + "|\n"
        for name, key in (("all, ms", "ms"), ("all with the clocks, ms", "ms_with_clocks")):
            text += f"| {name} " + "".join(f"| {row[key]:.2f} " for row in known) + "|\n"
        parts = [{label: (ms, calls) for label, ms, calls in row["parts"]} for row in known]
        for label in dict.fromkeys(label for each in parts for label in each):
            cells = [each.get(label) for each in parts]
            text += f"| {label} "
            text += "".join(f"| {c[0]:.2f} in {c[1]:.0f} calls " if c else "| " for c in cells)
            text += "|\n"
    return text


def read(path):
    """Return the newest rows of a results file, one a task, thread count and network."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return list({(row["what"], row["threads"], row["network"]): row for row in rows}.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="to measure with; 0: page alone")
    parser.add_argument("--json", metavar="FILE", help="append here, not in benchmarks/results")
    arguments = parser.parse_args()
    path = Path(arguments.json or engines.default_path("decode-profile"))
    if arguments.threads:
        measure(path, arguments.threads)
    PAGE.write_text(page(read(path)))


if __name__ == "__main__":
    main()
