"""Memory of the distillation loss by the number of tokens, beside the plain loss: flat or not."""

import json
import multiprocessing
import re
from pathlib import Path

import torch
from torch.nn import functional

from tailor_engine.ops import linear_kl

from .timing import machine

VOCABULARY, HIDDEN = 49152, 576


def run(tokens=(256, 1024, 4096)):
    """Return one row a token count: peak bytes that the loss and its gradients take."""
    rows = []
    for count in tokens:
        ours = in_a_new_process(linear_kl, count)
        # At 4,096 tokens the plain loss takes 5 GB.
        plain = in_a_new_process(_plain, count) if count <= 1024 else None
        rows.append({"op": "linear_kl", "tokens": count, "peak_bytes": ours, "torch_bytes": plain})
    return rows


def in_a_new_process(*arguments):
    """Return `peak`: memory that an earlier measurement freed would be taken again unseen."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, arguments)


def peak(loss, tokens, vocabulary=VOCABULARY, hidden=HIDDEN):
    """Return by how much one forward and backward raises the memory of this process (Linux)."""
    head, teacher_head = torch.randn(2, vocabulary, hidden) / hidden**0.5
    student, teacher = torch.randn(2, tokens, hidden)
    small = torch.randn(2, 8, requires_grad=True)  # loads what the first call of all loads
    loss(small, torch.randn(9, 8, requires_grad=True), small.detach(), torch.randn(9, 8)).backward()
    head.requires_grad_()
    student.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    loss(student, head, teacher, teacher_head).backward()
    return resident("VmHWM") - before


def resident(key):
    """Return a size of this process in bytes, such as VmRSS or its peak VmHWM (Linux)."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


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
