"""The CUDA kernels where there is no GPU: their source on the host, their code, their launches."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import resources
from tailor_engine.errors import TailorError
from tailor_engine.ops import OPS
from tailor_engine.ops import _small_batch as small_batch

ROOT = Path(__file__).parents[1]
BUILT = importlib.util.find_spec("tailor_engine._cuda") is not None
built = pytest.mark.skipif(not BUILT, reason="built only where nvcc is found")


@pytest.fixture(scope="module")
def emulated():
    """Build the kernels for the host and run all checks, in processes of their own."""
    command = [sys.executable, "-m", "tests.cuda_emulated"]
    build = subprocess.run([*command, "build"], cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr[-3000:]
    environment = os.environ | json.loads(build.stdout)
    if "/" not in environment["LD_PRELOAD"].split()[0]:
        pytest.skip("this compiler has no address sanitizer")
    run = subprocess.run(
        [*command, "run"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_the_kernels_own_source_is_right_on_the_host(emulated):
    failures = [line for line in emulated if line["failure"]]
    assert not failures, json.dumps(failures[:5], indent=1)
    ran = {line["op"] for line in emulated if line.get("launches")}
    assert ran == {name for name, op in OPS.items() if op.cuda is not None}
    cards = {(line["op"], line["card"]) for line in emulated if line.get("launches")}
    assert len(cards) == 3 * len(ran), "every kernel as cut for each of three cards"


@pytest.mark.parametrize(
    ("tokens", "layout", "dtype", "quantized", "expected"),
    [
        (1, "cpu", torch.bfloat16, False, "small batch"),
        (16, "cpu", torch.float32, True, "small batch"),
        (0, "cpu", torch.float16, False, "triton"),
        (17, "cpu", torch.float16, False, "triton"),
        (1, "canonical", torch.bfloat16, True, "triton"),
        (1, "cpu", torch.float32, False, "triton"),  # would have to be rounded to be an operand
        (1, "cpu", torch.float64, True, "triton"),
        (2047, "cpu", torch.bfloat16, False, "triton"),
        (2048, "cpu", torch.bfloat16, False, "unpack"),
        (2048, "cpu", torch.bfloat16, True, "triton"),
        (2048, "canonical", torch.bfloat16, False, "triton"),  # whose launcher unpacks by itself
    ],
)
def test_the_path_follows_from_the_shape(tokens, layout, dtype, quantized, expected):
    assert small_batch.path(tokens, 64, 64, 4, dtype, layout, quantized) == expected
    if expected == "small batch":
        eight = small_batch.path(tokens, 64, 64, 8, dtype, layout, quantized)
        assert eight == ("small batch" if quantized else "triton")
    assert small_batch.path(tokens, 0, 64, 4, dtype, layout, quantized) == "triton"


@built
def test_no_kernel_spills_and_each_fits_its_blocks():
    rows = resources.table(resources.module())
    kernels = {(row["gpu"], row["kernel"]) for row in rows}
    small = [row for row in rows if row["kernel"].startswith("small_batch<")]
    assert {gpu for gpu, _ in kernels} == {"sm_80", "sm_90a"} and len(small) == 2 * 20
    for row in rows:
        assert row["stack_bytes"] + row["local_bytes"] == 0, row
    for row in small:  # the blocks that small_batch_config counts on
        held = 3 if row["kernel"].split(", ")[2] == "1" else 2
        assert held * 256 * row["registers"] <= 65536, row


@built
@pytest.mark.parametrize("values", [32, 96, 256 * 32, 256 * 32 + 32, 49152 * 576])
def test_a_launch_covers_all_values_and_no_more(values):
    blocks, threads = cuda().int4_dequantize_config(values)
    assert (blocks - 1) * threads * 32 < values <= blocks * threads * 32
    assert threads % 32 == 0


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_a_launch_is_one_clear_error():
    native = cuda()
    refused = "the GPU launch was refused: .*driver"
    with pytest.raises(TailorError, match=f"int4_dequantize: {refused}"):
        native.int4_dequantize(256, 256, 0, 32, 32, 256, 0, 0)
    problem = native.Linear(256, 2, 1, 64, 64, 256, 256, 0, 0, 0, 256, 0)
    with pytest.raises(TailorError, match=f"int4_linear: {refused}"):
        native.int4_linear(problem, 64, native.Machine(132, 8), 0)


def cuda():
    from tailor_engine import _cuda

    return _cuda
