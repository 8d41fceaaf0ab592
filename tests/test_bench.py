"""The benchmark says what it measured; memory of the distillation loss is flat in the tokens."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as bench
from benchmarks import ceilings, levels, memory, ops, peers, results, roofline
from benchmarks.table import Table
from tailor_engine.errors import TailorError, UserError
from tailor_engine.ops import OPS, linear_kl

RATES = {
    "read": 10.0, "copy": 20.0, "float32": 100.0, "bfloat16": 200.0, "int8": 400.0, "int4": 600.0
}  # fmt: skip


@pytest.fixture
def limits():
    return ceilings.Ceilings("cpu.baseline", {torch.get_num_threads(): RATES})


@pytest.fixture
def small(monkeypatch):
    """Small shapes of one op, on buffers that need not leave any cache."""
    monkeypatch.setattr(ops, "COLD_BYTES", 1)
    monkeypatch.setattr(levels, "cache_bytes", lambda: 0)

    def benchmarks():
        for rows in (4, 40):
            yield f"{rows}x8", (torch.randn(rows, 8), None, torch.zeros(8, 8))

    monkeypatch.setitem(OPS, "gram", dataclasses.replace(OPS["gram"], benchmarks=benchmarks))


def test_memory_of_linear_kl_does_not_grow_with_the_tokens():
    small, large = (memory.in_a_new_process(linear_kl, n, 16384, 32) for n in (1024, 4096))
    logits = 3072 * 16384 * 4
    assert large - small < 0.05 * logits  # the states' own gradients, not logits


def test_filters_choose_shapes_and_peers(small, limits):
    choice = ops.Choice(("gram",), shapes=("40x*",), quick=True)
    (row,) = ops.run(choice, limits)
    assert row.shape == "40x8" and list(row.peers) == ["torch X.T @ X"]
    with pytest.raises(UserError, match="no shape is 5x5; the shapes are 4x8, 40x8"):
        list(ops.run(ops.Choice(("gram",), shapes=("5x5",)), limits))
    with pytest.raises(UserError, match=r"unknown peer 'mkl'; the peers are torch X\.T @ X$"):
        ops.Choice(("gram",), peers=("mkl",))
    assert ops.Choice(("int8_linear",), peers=("torch fp32",)).wants_peer("torch fp32")
    assert not ops.Choice(("int8_linear",), peers=("torch fp32",)).wants_peer("torch bf16")


@pytest.mark.parametrize("backend", ["reference", "cpu.baseline"])
def test_results_hold_every_field_and_append(small, limits, tmp_path, backend):
    file = results.Results(tmp_path / "rows.jsonl", {"date": "2026-01-01"})
    for _ in range(2):
        for row in ops.run(ops.Choice(("gram",), backend, quick=True), limits):
            file.append(row.as_dict())
    rows = results.read(file.path)
    assert [row["shape"] for row in rows] == ["4x8", "40x8"] * 2
    fields = "op backend level threads shape dtype us spread gflops gbps limit percent_of_limit"
    assert {*fields.split(), "peers", "date"} <= set(rows[0])
    assert rows[0]["backend"] == backend and rows[0]["peers"]["torch X.T @ X"] > 0
    moved, operations = OPS["gram"].cost(*next(OPS["gram"].benchmarks())[1])
    assert rows[0]["gflops"] * rows[0]["us"] * 1e3 == pytest.approx(operations, rel=1e-3)
    assert rows[0]["gbps"] * rows[0]["us"] * 1e3 == pytest.approx(moved, rel=1e-3)


def test_a_wrong_answer_is_refused_not_timed(small, limits, monkeypatch):
    def wrong(native, x, mask, out):
        out.add_(1.01 * (x.T @ x))

    op = dataclasses.replace(OPS["gram"], cpu=wrong, benchmarks=OPS["gram"].benchmarks)
    monkeypatch.setitem(OPS, "gram", op)
    monkeypatch.setattr(ops, "interleaved", lambda *_: pytest.fail("timed a wrong answer"))
    from tailor_engine.ops import _op

    _op._implementation.cache_clear()
    try:
        with pytest.raises(TailorError, match=r"gram 4x8 on cpu.baseline is wrong, not timed"):
            list(ops.run(ops.Choice(("gram",), "cpu.baseline"), limits))
    finally:
        _op._implementation.cache_clear()


@pytest.mark.parametrize(
    ("arithmetic", "dtype", "moved", "operations", "expected"),
    [
        ("float", torch.float32, 10e9, 0, ("memory", 1.0)),
        ("none", torch.float32, 10e9, 0, ("memory", 0.5)),  # of copies: read and written
        ("float", torch.float32, 1, 100e9, ("float32", 1.0)),
        ("float", torch.bfloat16, 1, 100e9, ("bfloat16", 0.5)),
        ("int8", torch.float32, 1, 100e9, ("int8", 0.25)),
        ("int4", torch.float32, 1, 300e9, ("int4", 0.5)),
        ("int8", torch.float32, 10e9, 100e9, ("memory", 1.0)),
    ],
)
def test_the_limit_is_the_slower_of_memory_and_the_ops_own_arithmetic(
    limits, arithmetic, dtype, moved, operations, expected
):
    op = dataclasses.replace(OPS["gram"], arithmetic=arithmetic)
    found = limits.limit(op, dtype, moved, operations, torch.get_num_threads())
    assert found == (expected[0], pytest.approx(expected[1]))


def test_every_arithmetic_has_a_ceiling():
    assert {op.arithmetic for op in OPS.values()} <= {"float", "int8", "int4", "none"}


@pytest.mark.parametrize("name", sorted(OPS))
def test_peers_run_on_the_declared_cases(name):
    arguments = list(OPS[name].cases())[1]
    for peer in peers.peers(name, arguments).values():
        if not peer.skipped:
            peer.make()()


def test_one_line_a_shape_and_the_picture(small, limits, tmp_path):
    written = io.StringIO()
    table = Table(Console(file=written, width=120))
    stamp = {"machine": {"processor": "a processor"}, "ceilings": {}}
    stamp["ceilings"] = {str(count): rates for count, rates in limits.rates.items()}
    file, rows = results.Results(tmp_path / "rows.jsonl", stamp), []
    for row in ops.run(ops.Choice(("gram",), "cpu.baseline", quick=True), limits):
        table.row(row)
        rows.append(file.append(row.as_dict()))
    table.close()
    lines = written.getvalue().splitlines()
    assert [line.split()[0] for line in lines if line.endswith("x")] == ["4x8", "40x8"]
    assert max(map(len, lines)) <= 120
    for name in ("roofline.png", "roofline.svg"):
        roofline.draw(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_a_lower_level_starts_again_with_its_peers_held(monkeypatch):
    started = []
    for name in levels.HELD_TO_AVX2:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(levels, "best", lambda: "cpu.avx512vnni")
    monkeypatch.setattr(levels, "processor", lambda: ("a processor", ["avx2", "avx512f"]))
    monkeypatch.setattr(levels.os, "execve", lambda *call: started.append(call))
    for backend in (None, "reference", "cpu.avx512vnni"):
        levels.hold_peers(backend, ["gram"])
    assert not started and levels.peers_have("avx512f")
    levels.hold_peers("cpu.avx2", ["gram", "--backend", "cpu.avx2"])
    ((_, command, environment),) = started
    assert command[1:] == ["-m", "benchmarks", "gram", "--backend", "cpu.avx2"]
    assert levels.HELD_TO_AVX2.items() <= environment.items()
    for name, value in levels.HELD_TO_AVX2.items():
        monkeypatch.setenv(name, value)
    levels.hold_peers("cpu.avx2", ["gram"])  # held now: no second start
    assert len(started) == 1 and not levels.peers_have("avx512f")


def test_whole_models_are_modules_of_their_name(monkeypatch):
    monkeypatch.setitem(bench.WHOLE, "absent", "what it would measure")
    with pytest.raises(UserError, match="benchmarks/absent.py is not written yet"):
        bench.whole("absent")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "error: unknown op 'nothing'; there are block_influence, "),
        (["--backend", "gpu"], "error: unknown backend 'gpu'"),
        (["gram", "--peer", "mkl"], "error: unknown peer 'mkl'; the peers are torch X.T @ X"),
        (["--threads", "0"], "error: --threads must be >= 1"),
        (["--plot", "a.pdf"], "error: --plot must end in .png or .svg"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert bench.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(words) and printed.count("\n") == 1


def test_the_command_measures_ceilings_first_and_appends(tmp_path):
    target = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "tailor_engine.cli", "bench", "structured_slice", "--quick"]
    ended = subprocess.run(
        [*command, "--threads", "1", "--json", str(target)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.index("fp32 FMA") < ended.stdout.index("structured_slice")
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert {"machine", "ceilings", "date", "percent_of_limit", "peers"} <= set(rows[0])
    assert rows[0]["ceilings"]["1"]["read"] > 0 and rows[0]["peers"]["memcpy"] > 0
