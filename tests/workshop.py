"""A tiny model, two text files and recipes on the disk, for tests of whole runs."""

import random

import yaml

from tailor_engine.io import models
from tests.tiny import SENTENCES, tiny

EVALUATE = {"rows": 2, "sequence_length": 32, "batch_size": 2, "new_tokens": 0}
QUICK = {"sequence_length": 32, "batch_size": 2, "validation_rows": 2}
STAGES = [
    {"correct": {**QUICK, "steps": 6, "checkpoint_steps": 1}},
    {"prune": {"sequence_length": 32, "rows": 16, "fisher_rows": 4, "rounding": 32}},
    {"distill": {**QUICK, "steps": 8, "checkpoint_steps": 1}},
    {"specialize": {**QUICK, "steps": 3, "checkpoint_steps": 1}},
    {"quantize": {"sequence_length": 32, "rows": 4}},
]


def furnish(folder):
    """Write a tiny model, domain.txt, general.txt and recipe.yaml into a folder."""
    models.save(tiny("llama", layers=2), folder / "tiny")
    chance = random.Random(0)
    for name in ("domain", "general"):
        passages = (" ".join(chance.choices(SENTENCES, k=12)) + f" {name} {i}" for i in range(200))
        (folder / f"{name}.txt").write_text("\n\n".join(passages))
    recipe(folder)
    return folder


def recipe(folder, name="recipe.yaml", **changes):
    """Write a recipe of every stage; return its path as text."""
    values = {
        "model": str(folder / "tiny"),
        "domain": {"source": str(folder / "domain.txt"), "passage": 400},
        "general": {"source": str(folder / "general.txt"), "passage": 400},
        "evaluate": EVALUATE,
        "stages": STAGES,
    }
    (folder / name).write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return str(folder / name)
