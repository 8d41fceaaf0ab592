"""The benchmark says what it measured; memory of the distillation loss is flat in the tokens."""

import json
import subprocess
import sys

import torch

from benchmarks import memory
from tailor_engine.ops import linear_kl


def test_memory_of_linear_kl_does_not_grow_with_the_tokens():
    head, teacher_head = torch.randn(2, 16384, 32)
    head.requires_grad_()

    def peak(tokens):
        student, teacher = torch.randn(2, tokens, 32)
        student.requires_grad_()
        return memory.peak(lambda: linear_kl(student, head, teacher, teacher_head), head)

    small, large = peak(1024), peak(4096)
    logits = 3072 * 16384 * 4
    assert large - small < 0.05 * logits  # the states' own gradients, not logits


def test_a_run_appends_lines_with_the_machine(tmp_path):
    target = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "tailor_engine.cli", "bench", "structured_slice", "--quick"]
    ended = subprocess.run(
        [*command, "--json", str(target)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "GB/s read" in ended.stdout and "structured_slice" in ended.stdout
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert {"op", "us", "spread", "gbps", "percent_of_limit", "peers", "machine"} <= set(rows[0])
    assert rows[0]["peers"]["torch"] > 0
