"""Trains a tiny model and saves its weights; test_train.py has torchrun start it twice."""

from __future__ import annotations

import sys

import torch
from accelerate import PartialState

from tailor_engine.data import Corpus, Data, Document
from tailor_engine.stages.correct import correct
from tailor_engine.stages.distill import distill
from tests.tiny import SENTENCES, tiny

CONFIG = {
    "steps": 4,
    "batch_size": 5,  # does not divide by two processes and two micro-batches
    "gradient_accumulation": 2,
    "sequence_length": 32,
    "learning_rate": 3e-3,
    "epsilon": 1e-4,  # else AdamW blows rounding in near-zero gradients up to whole steps
    "precision": "float32",
    "validation_rows": 3,
}


def tiny_data() -> Data:
    """Return a domain of four sentences in many variants and a general corpus of four others."""
    domain, general = (
        [Document(f"{text} {i}", answer_start=i % 20) for i in range(60) for text in part]
        for part in (SENTENCES[:4], SENTENCES[4:])
    )
    return Data(Corpus.from_documents("domain", domain), Corpus.from_documents("general", general))


def trained() -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the weights after correct and distill, and all losses that were reported."""
    data = tiny_data()
    teacher, corrected = correct(tiny("llama"), CONFIG, data)
    student = tiny("llama", seed=1, layers=2).replace(teacher=teacher)
    student, distilled = distill(student, CONFIG | {"hidden_weight": 0.5}, data)
    curves = [r.metrics[k] for r in (corrected, distilled) for k in ("loss", "validation_loss")]
    return dict(student.network.named_parameters()), [loss for curve in curves for loss in curve]


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = trained()
    state = PartialState()
    if state.num_processes != 2:
        sys.exit(f"expected 2 processes, got {state.num_processes}")
    if state.is_main_process:
        torch.save(result, sys.argv[1])
    state.destroy_process_group()
