"""`python -m benchmarks.latency`: the same decode time reached over all axes, and over each alone.

Every row prunes SmolLM2 to a share of its measured int4 decode step, and is judged on held-out text
of both corpora. An axis that cannot reach the share says so. Rows that the file holds already are
not run again. Calibrated on python-docs; general text: WikiText-2, from files or from the hub.
"""

import argparse
import json
import time

import tailor_engine
from tailor_engine.stages import get
from tailor_engine.stages._text_loss import losses

from . import results
from .judge import Judge, ratio
from .quality import MODEL, started
from .timing import machine, today

#: Four finalists: from no whole block dropped to as many as reach the share alone.
METHODS = {
    "tailor all axes": {
        "axes": ["mlp", "attention", "sublayers", "blocks", "vocabulary"],
        "finalists": 4,
    },
    "tailor in nats": {"axes": ["mlp", "attention", "sublayers", "vocabulary"]},
    "tailor sublayers": {"axes": ["sublayers"]},
    "tailor blocks": {"axes": ["blocks"]},
    "tailor mlp": {"axes": ["mlp"]},
    "tailor attention": {"axes": ["attention"]},
    "tailor vocabulary": {"axes": ["vocabulary"]},
}


def run(wanted, data, share, rows, bits, seed=0):
    """Yield one row a method."""
    model = tailor_engine.load(MODEL)
    test = Judge(model, data, "test")
    for method in wanted:
        settings = METHODS[method] | {"latency": share, "rows": rows, "bits": bits}
        # The lowest floor there is: half of the channels are hardly felt in a step's time.
        settings |= {"floor": 0.02, "domain_weight": 1.0, "seed": seed}
        asked = {"method": method, "share": share, "rows": rows, "bits": bits, "seed": seed}
        start = time.perf_counter()
        try:
            smaller, report = get("prune")(model, settings, data)
        except tailor_engine.UserError as error:
            yield {"method": method, "asked": asked, "unreachable": str(error)} | stamp()
            continue
        seconds = time.perf_counter() - start
        judged = {name: losses(smaller, texts) for name, texts in test.texts.items()}
        yield row(asked, test.dense, judged, report, seconds)


def row(asked, dense, judged, report, seconds):
    """Return what is written of one method."""
    figures = report.metrics
    found = {
        "method": asked["method"],
        "latency_ms": figures["latency_ms"],
        "latency_ms_dense": figures["latency_ms_dense"],
        "latency_ratio": figures["latency_ms"] / figures["latency_ms_dense"],
        "latency_ms_predicted": figures.get("latency_ms_predicted"),
        "latency_ms_dense_predicted": figures.get("latency_ms_dense_predicted"),
        "removed": 1 - report.parameters_after / report.parameters_before,
        "predicted_nats": figures.get("predicted_loss_rise_nats_total"),
        "finalist": figures["finalist"],
        "seconds": seconds,
        "calibration_tokens": figures["calibration_tokens"],
        "asked": asked,
        "shape": {key: figures[key] for key in ("widths", "heads", "blocks_dropped", "tokens")},
    }
    for name in judged:
        risen = ratio(dense[name], judged[name])
        found |= {f"{name}_ratio": risen.value, f"{name}_stderr": risen.stderr}
        # A text takes more steps where the vocabulary is smaller.
        found[f"{name}_tokens"] = float(judged[name][1].sum() / dense[name][1].sum())
    return found | stamp()


def stamp():
    """Return when and where."""
    return {"date": today(), "machine": machine()}


def line(found):
    """Return one printed line."""
    if "unreachable" in found:
        return f"{found['method']}: {found['unreachable']}"
    ratios = "  ".join(
        f"{name} {found[f'{name}_ratio']:.3f} ± {found[f'{name}_stderr']:.3f}"
        for name in ("domain", "general")
    )
    return (
        f"{found['method']}: {found['latency_ms']:.2f} of {found['latency_ms_dense']:.2f} ms "
        f"({100 * (found['latency_ratio'] - 1):+.1f} %), parameters "
        f"{-100 * found['removed']:+.1f} %: {ratios}  {found['seconds']:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--share", type=float, default=0.8, help="of the decode time that stays")
    parser.add_argument("--rows", type=int, default=64, help="calibration sequences")
    parser.add_argument("--bits", type=int, default=4, help="of the weights that are timed")
    arguments, data, path = started(parser, "latency")
    done = [row["asked"] for row in results.read(path)] if path.exists() else []
    choice = {"share": arguments.share, "rows": arguments.rows, "bits": arguments.bits}
    wanted = [
        method
        for method in METHODS
        if {"method": method, **choice, "seed": 0} not in done and (arguments.only or "") in method
    ]
    for found in run(wanted, data, arguments.share, arguments.rows, arguments.bits):
        print(line(found), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
