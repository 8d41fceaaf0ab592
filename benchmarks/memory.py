"""Memory of the distillation loss by the number of tokens, beside the plain loss: flat or not."""

import json
from pathlib import Path

import torch
from torch.nn import functional

from tailor_engine.ops import linear_kl
from tailor_engine.stages.evaluate import LiveBytes

from .timing import machine

VOCABULARY, HIDDEN = 49152, 576


def run(tokens=(256, 1024, 4096)):
    """Return one row a token count: peak bytes of what the loss and its gradients allocate."""
    rows = []
    head, teacher_head = torch.randn(2, VOCABULARY, HIDDEN) / HIDDEN**0.5
    head.requires_grad_()
    for count in tokens:
        student, teacher = torch.randn(2, count, HIDDEN)
        student.requires_grad_()
        ours = peak(lambda s=student, t=teacher: linear_kl(s, head, t, teacher_head), head)
        plain = None
        if count <= 1024:  # at 4,096 tokens the plain loss takes 5 GB
            plain = peak(lambda s=student, t=teacher: _plain(s, head, t, teacher_head), head)
        rows.append({"op": "linear_kl", "tokens": count, "peak_bytes": ours, "torch_bytes": plain})
    return rows


def peak(loss, head):
    """Return the largest number of live bytes in one forward and backward."""
    head.grad = None
    with LiveBytes() as live:
        loss().backward()
    return live.peak


def record(rows, path):
    """Append the rows to a JSON-lines file."""
    with Path(path).open("a") as file:
        for row in rows:
            file.write(json.dumps(row | {"machine": machine()}) + "\n")


def line(row):
    """Return one printed line."""
    plain = "not run" if row["torch_bytes"] is None else f"{row['torch_bytes'] / 1e6:.0f} MB"
    return f"linear_kl, {row['tokens']:5} tokens: {row['peak_bytes'] / 1e6:6.0f} MB, torch {plain}"


def _plain(student, head, teacher, teacher_head):
    log_p = functional.log_softmax(student @ head.T, -1)
    log_q = functional.log_softmax(teacher @ teacher_head.T, -1)
    return functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
