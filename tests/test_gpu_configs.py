"""What the GPU launchers decide on the host, over grids of shapes, without a GPU."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from tailor_engine.kernels import (
    _head,
    block_influence,
    channel_stats,
    gram,
    linear_kl,
    linear_kl_topk,
    structured_slice,
)

TOKENS = (1, 255, 256, 1000, 4096, 5000, 8192, 100_000)
VOCABULARIES = (1, 7, 128, 32_001, 49_152, 128_256, 151_936, 262_144)
CHANNELS = (1, 5, 16, 33, 64, 576, 1536, 2048, 4096, 4100, 11_008)


@pytest.mark.parametrize("size", (2, 4, 8))
def test_chunks_of_a_linear_head_are_even_and_rows_are_aligned(size):
    for tokens, vocabulary, rows in itertools.product(TOKENS, VOCABULARIES, (1, 2)):
        chosen = _head.config(tokens, vocabulary, size, rows)
        chunk = chosen["tokens"]
        assert chunk == tokens or chunk % _head.SHORTEST == 0
        count = -(-tokens // chunk)
        assert tokens - (count - 1) * chunk > chunk - count * _head.SHORTEST, "a short last chunk"
        assert chunk <= _head.LONGEST and chunk * 2 * vocabulary * size <= _head.BUFFER_BYTES
        assert chosen["stride"] - 16 < vocabulary <= chosen["stride"]
        assert chosen["stride"] * size % 16 == 0 and chosen["lanes"] * size == 16
        assert chosen["lines"] == 32 * chosen["warps"] and 1 <= chosen["warps"] <= 32
        block = chosen["lines"] * chosen["lanes"]
        assert block < 2 * max(vocabulary, 32 * chosen["lanes"]), "a block much longer than a row"
    assert _head.config(4096, 151_936, 2)["tokens"] == 2048  # 16-bit logits: 2k to 4k tokens
    assert _head.config(4096, 262_144, 2)["tokens"] == 2048


def test_long_rows_run_alone_on_a_processor():
    assert linear_kl.config(4096, 49_152, 2)["warps"] == 32  # 192 KB of logits a program
    assert linear_kl.config(4096, 49_152, 2, linear_kl.JENSEN_SHANNON)["warps"] == 8
    assert linear_kl_topk.config(4096, 49_152, 2, 64)["warps"] == 16  # 96 KB
    assert linear_kl_topk.config(4096, 128_256, 2, 64)["warps"] == 32
    assert linear_kl_topk.config(4096, 49_152, 2, 50)["slots"] == 64


@pytest.mark.parametrize("plain", (True, False))
def test_tiles_of_gram_cover_the_triangle_once(plain):
    for tokens, channels in itertools.product(TOKENS, CHANNELS):
        chosen = gram.config(tokens, channels, 2, plain)
        if plain and channels < 3072:
            assert chosen == {"tiles": 0}
            continue
        rows, columns = chosen["rows"], chosen["columns"]
        edge = -(-channels // columns)
        assert chosen["tiles"] * rows * columns == columns**2 * edge * (edge + 1) // 2
        assert chosen["whole"] % gram.PROCESSORS == 0
        assert chosen["splits"] <= max(1, tokens // gram.SHORTEST_SPLIT)
        assert rows % 32 == 0 and columns % 32 == 0 and columns % rows == 0
    assert gram.config(8192, 4096, 4, plain) == {"tiles": 0}


def test_the_last_tiles_of_gram_share_the_card():
    chosen = gram.config(8192, 4096, 2, True)
    rest = chosen["tiles"] - chosen["whole"]
    assert (chosen["tiles"], chosen["whole"]) == (272, 264)
    assert chosen["splits"] >= 8 and rest * chosen["splits"] <= gram.PROCESSORS
    assert gram.best_splits(0, 8192) == gram.best_splits(132, 8192) == 1


@pytest.mark.parametrize("size", (2, 4, 8))
def test_statistics_load_16_bytes_a_thread(size):
    for tokens, channels in itertools.product(TOKENS, CHANNELS):
        chosen = channel_stats.config(tokens, channels, size)
        threads = 32 * chosen["warps"]
        assert chosen["block_t"] * chosen["block_d"] * size == 16 * threads
        assert chosen["rows"] % (chosen["block_t"] * chosen["deep"]) == 0
        assert chosen["rows"] <= channel_stats.SPLIT_ROWS
        chosen = block_influence.config(tokens, channels, size)
        assert chosen["block_t"] * chosen["block_d"] * size == 32 * threads
        idle = -(-channels // chosen["block_d"]) * chosen["block_d"] - channels
        assert idle <= channels / 8 or chosen["block_d"] * size <= 128
        assert 32 <= chosen["block_p"] <= 2048


def test_candidates_start_with_the_usual_choice():
    for module, arguments in (
        (linear_kl, (4096, 49_152, 2)),
        (linear_kl_topk, (4096, 49_152, 2, 64)),
        (gram, (8192, 4096, 2, True)),
        (gram, (8192, 1536, 2, False)),
        (gram, (8192, 4096, 4, True)),
        (channel_stats, (8192, 4096)),
        (block_influence, (8192, 4096)),
        (structured_slice, ()),
    ):
        found = module.candidates(*arguments)
        assert found[0] == module.config(*arguments)
        assert all(choice not in found[:i] for i, choice in enumerate(found))


@pytest.fixture
def launched(monkeypatch):
    """Record what is launched, and launch nothing."""
    found = []

    def record(self, *args, grid, warmup, **options):
        found.append((self.fn.__name__, grid))

    monkeypatch.setattr(JITFunction, "run", record)
    return found


def calls():
    """Yield kernel module and arguments, on the CPU: whatever reads a value there is seen."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator).to(dtype)

    f64, mask = torch.float64, torch.arange(600) % 3 != 0
    for channels in (20, 300, 1100):
        x = normal(600, channels)
        for out in (torch.zeros(channels, channels), torch.zeros(channels, channels, dtype=f64)):
            yield gram, (x, mask, out)
            yield gram, (x, None, out)
        yield gram, (x.float(), mask, torch.zeros(channels, channels))
        yield channel_stats, (x, mask, torch.zeros(5, channels))
        yield block_influence, (x, x, mask, torch.zeros(4, dtype=f64))
    head, labels = (normal(600, 8), normal(33, 8)), torch.arange(600) % 33
    for kind in ("forward", "reverse", "jensen_shannon"):
        numbers = (kind, 2.0, 0.5, 30.0, 0.0, True, True)
        yield linear_kl, (*head, *head, labels, mask, *numbers)
    listed = torch.zeros(600, 2, dtype=torch.int64), torch.zeros(600, 2)
    yield linear_kl_topk, (*head, *listed, labels, mask, 2.0, 0.5, 30.0, True, True)
    kept = torch.tensor([0, 2, 5])
    weights = [normal(6, 64), normal(9, 6), normal(6).float(), normal(40, 6).T, normal(8, 8)]
    rows, columns = [kept, None, kept, kept, None], [None, kept, None, None, None]
    yield structured_slice, (weights, rows, columns)


READS = ("item", "cpu", "tolist", "nonzero", "numpy", "__bool__", "__int__", "__float__")


def test_launchers_never_wait_for_the_device(launched, monkeypatch):
    every = list(calls())

    def refuse(name):
        def read(*_, **__):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return read

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse(name))
        for module, arguments in every:
            module.launch(*arguments)
            assert module.config(*module.describe(*arguments))
    assert launched


def test_a_model_is_sliced_in_one_launch(launched):
    module, arguments = list(calls())[-1]
    module.launch(*arguments)
    assert [name for name, _ in launched] == ["copy_kernel"]
    assert launched[0][1] == (5,)


def test_every_candidate_is_right_in_the_interpreter():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment.pop("TAILOR_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_candidates"],
        cwd=Path(__file__).parents[1], env=environment, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    failures = [line for line in lines if line["failure"]]
    assert len(lines) > 15 and not failures, json.dumps(failures, indent=1)
