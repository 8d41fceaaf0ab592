"""Triton kernels without a GPU: interpreted on the ops' cases, compiled for real cards.

What runs where stands in tests/triton_interpret.py and tests/triton_compile.py; both are processes
of their own, for Triton decides at its import whether it interprets.
"""

import functools
import itertools
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
STREAMING = {
    "int4_dequantize.tile_kernel",
    "int4_quantize.group_kernel",
    "fake_quantize.row_kernel",
    "fake_quantize.group_kernel",
}
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
        count = line["instructions"]
        if line["kernel"] in EXACT or (line["kernel"] == "_tokens.row_kernel" and line["QUANTIZE"]):
            assert count["div.rn.f32"] and not count["div.full"], line  # IEEE division only
        if line["kernel"].endswith(".product_kernel") and not line["exact_float"]:
            assert count["wgmma.mma_async"], line  # on tensor cores, a warp group at a time
            assert count["cp.async.c"], line  # loads run ahead of them
        of_its_own_op = line["kernel"].startswith(line["op"]) and line["kernel"] in STREAMING
        if of_its_own_op or line["op"] == "int8_quantize":
            assert count["ld.global.v4"] and count["st.global.v4"], line  # 16 bytes a thread


TOKENS = (1, 2, 16, 17, 40, 64, 65, 128, 300, 512, 1000, 2047, 2048, 5000)
LAYERS = ((7, 64), (576, 576), (1536, 576), (4096, 4096), (11008, 4096), (4096, 11008))


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize(("features", "width"), LAYERS)
def test_configurations_fit_the_card_and_the_shape(capability, features, width):
    from tailor_engine.kernels import int4_linear, int8_linear

    shared = {**SHARED_BYTES, 86: 99 << 10}[capability]
    for tokens, size in itertools.product(TOKENS, (1, 2, 4, 8)):
        found = int8_linear.candidates(tokens, features, width, size, capability)
        for chosen in found:
            loads = chosen["block_n"] + chosen["block_t"] * size
            fits(chosen, tokens, chosen["block_k"] * loads, shared)
        assert found[0]["parts"] <= max(1, width // chosen["block_k"] // 4)
        for group in (32, 64):
            found = int4_linear.candidates(
                tokens, features, width, group, "canonical", size == 1, size, capability
            )
            for chosen in found:
                loads = chosen["block_n"] // 2 + chosen["block_t"] * size
                fits(chosen, tokens, group * loads, shared)
            many = tokens >= int4_linear.DENSE_TOKENS or size == 8
            assert found[0]["dense"] == (many and size > 1)
            assert found[0]["parts"] <= max(1, width // group // 4)
            assert len(found) <= 20 and all(found.count(chosen) == 1 for chosen in found)


def fits(chosen, tokens, step_bytes, shared):
    assert chosen["block_t"] < 2 * max(tokens, 16)  # at most half of a tile's tokens are not there
    assert chosen["stages"] * step_bytes <= shared
    assert chosen["parts"] in (1, 2, 4, 8) and chosen["warps"] in (4, 8)


def test_the_untuned_choice_fills_the_card():
    from tailor_engine.kernels import int4_linear, int8_linear
    from tailor_engine.kernels._device import PROCESSORS

    for tokens in (1, 16, 64, 128, 256, 512, 1024):
        for module, description in (
            (int4_linear, (tokens, 4096, 4096, 128, "canonical", False, 2, 90)),
            (int8_linear, (tokens, 4096, 4096, 1, 90)),
        ):
            chosen = module.config(*description)
            tiles = -(-tokens // chosen["block_t"]) * -(-4096 // chosen["block_n"])
            assert tiles * chosen["parts"] >= 0.75 * PROCESSORS, (tokens, chosen)


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
