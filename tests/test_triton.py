"""Triton kernels without a GPU: interpreted on the ops' cases, compiled for real cards.

What runs where stands in tests/triton_interpret.py and tests/triton_compile.py; both are processes
of their own, for Triton decides at its import whether it interprets.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tailor_engine.ops import OPS

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of one program, at most
EXACT = {
    "int4_quantize.group_kernel",
    "fake_quantize.row_kernel",
    "fake_quantize.group_kernel",
}


@pytest.fixture(scope="module")
def lines():
    """Start the three processes at once; return a function that waits for one and reads it."""
    processes = {
        "interpreted": start("tests.triton_interpret", TRITON_INTERPRET="1"),
        90: start("tests.triton_compile", "90", TRITON_INTERPRET="0"),
        80: start("tests.triton_compile", "80", TRITON_INTERPRET="0"),
    }

    @functools.cache
    def read(name):
        output, errors = processes[name].communicate(timeout=600)
        assert processes[name].returncode == 0, errors[-3000:]
        return [json.loads(line) for line in output.splitlines()]

    yield read
    for process in processes.values():
        process.kill()
        process.wait()


def start(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    environment.pop("TAILOR_BACKEND", None)
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_every_kernel_in_the_interpreter(lines):
    cases = lines("interpreted")
    expected = {name for name in OPS if (ROOT / f"kernels/triton/{name}.py").exists()}
    assert {case["op"] for case in cases} == expected
    failures = [case for case in cases if case["failure"]]
    assert not failures, json.dumps(failures, indent=1)


@pytest.mark.parametrize("capability", [90, 80])
def test_every_kernel_compiles_without_spilling(lines, capability):
    compiled = lines(capability)
    written = {
        f"{path.stem}.{name}"
        for path in (ROOT / "kernels/triton").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert {line["kernel"] for line in compiled} == written
    for line in compiled:
        assert line["spilled_bytes"] == 0, line
        assert line["registers"] * line["num_warps"] * 32 <= 65536, line
        assert line["shared_bytes"] <= SHARED_BYTES[capability], line


def test_the_compiled_instructions_are_the_intended_ones(lines):
    for line in lines(90):
        count = {name.replace("\\", ""): n for name, n in line["instructions"].items()}
        if line["kernel"] in EXACT or (line["kernel"] == "_tokens.row_kernel" and line["QUANTIZE"]):
            assert count["div.rn.f32"] and not count["div.full"], line  # IEEE division only
        if line["kernel"].endswith(".product_kernel"):
            assert count["wgmma.mma_async"], line  # on tensor cores, a warp group at a time


def test_the_chunk_of_a_linear_head_fits_its_budget():
    from tailor_engine.kernels import _head

    for vocabulary in (1, 49152, 151936, 262144):
        for size in (2, 4):
            tokens = _head.config(100_000, vocabulary, size)["tokens"]
            assert tokens == _head.LONGEST or 2 * tokens > _head.BUFFER_BYTES / (
                2 * vocabulary * size
            )
            assert tokens >= _head.SHORTEST and tokens & (tokens - 1) == 0
            assert tokens * 2 * vocabulary * size <= _head.BUFFER_BYTES
    assert _head.config(0, 10, 4)["tokens"] == 0
