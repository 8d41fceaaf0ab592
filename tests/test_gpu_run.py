"""benchmarks.gpu as a whole, without a GPU: what is run, crashes, is resumed and reported."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_card, gpu_checks, gpu_shapes, gpu_times, gpu_worker, results
from tailor_engine.ops import OPS
from tests.test_gpu_script import RATES, TIMED, _refuse

POPEN = subprocess.Popen


def test_without_a_gpu_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.NO_GPU == 2
    assert capsys.readouterr().out.splitlines() == [
        "benchmarks.gpu: no CUDA GPU here, or no driver for it; nothing was measured"
    ]


def test_a_rehearsal_runs_from_end_to_end_and_is_resumed(tmp_path, capsys):
    """With the real worker, in processes of its own, on Triton's interpreter."""
    path = tmp_path / "rows.jsonl"
    command = ["--rehearse", "--only", "rms_norm", "--json", str(path)]
    assert gpu.main(command) == 0, capsys.readouterr().out
    rows = results.read(path)
    done = [row["unit"] for row in rows if row["kind"] == "unit"]
    assert done == ["check rms_norm", "ceilings", "time rms_norm"]
    times = [row for row in rows if row["kind"] == "time"]
    assert [row["backend"] for row in times] == ["triton"] * 2
    assert all(row["rivals"]["torch"] > 0 and row["percent_of_limit"] > 0 for row in times)
    checks = [row for row in rows if row["kind"] == "check"]
    assert len(checks) == len(list(OPS["rms_norm"].cases())) + len(times)
    assert not any(row["failure"] for row in checks)
    capsys.readouterr()
    assert gpu.main(command) == 0
    assert "3 parts are done and skipped" in capsys.readouterr().out
    assert results.read(path) == rows


def test_the_worker_reports_goes_on_after_an_exception_and_stops_where_the_card_does(
    monkeypatch, capsys
):
    def run(unit, card, model):
        assert model == "folder"
        if unit == "check gram":
            raise ValueError("wrong")
        yield {"kind": "check", "op": unit, "failure": ""}

    monkeypatch.setattr(gpu_worker, "own_kernels", lambda: None)
    monkeypatch.setattr(gpu_worker, "watched", lambda: {1: ("gram.k", None)})
    monkeypatch.setattr(gpu_worker.gc, "freeze", lambda: None)
    monkeypatch.setattr(gpu_worker, "run", run)
    units = ["check gram", "time gram"]
    assert gpu_worker.main(["--rehearse", "--model", "folder", *units]) == 0
    told = [gpu_worker.heard(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(message)) for message in told] == ["begin", "end", "begin", "row", "end"]
    assert "ValueError: wrong" in told[1]["failure"] and not told[-1]["failure"]
    monkeypatch.setattr(gpu_worker, "is_stuck", lambda card: True)
    assert gpu_worker.main(["--rehearse", "--model", "folder", *units]) == gpu_worker.STUCK
    assert gpu_worker.main(["--rehearse", "--until", "0", *units]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_card_that_answers_nothing_is_stuck(monkeypatch):
    monkeypatch.undo()
    assert not gpu_worker.is_stuck(gpu_card.Rehearsal())
    assert gpu_worker.is_stuck(SimpleNamespace(synchronize=_refuse))
    assert type(gpu_worker.card_of([])) is gpu_card.Card


# A worker that says what it is told to in its units' names, in place of the one that needs a card.
FAKE = """
import json, os, sys, time
for unit in [word for word in sys.argv[1:] if " " in word]:
    say = lambda **message: print("@gpu " + json.dumps(message), flush=True)
    print("a library's own words", end=" ")
    say(begin=unit)
    if "crash" in unit: os.abort()
    if "hang" in unit: time.sleep(60)
    bad = "differs" if "bad" in unit else ""
    say(row={"kind": "check", "op": unit, "backend": "triton", "case": 0, "failure": bad})
    say(end=unit, failure="illegal access" if "stuck" in unit else "", seconds=0.1)
    if "stuck" in unit: sys.exit(75)
"""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Return a function that makes a Run whose worker is the fake one."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def start(command, **options):
        return POPEN([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    monkeypatch.setattr(gpu, "UNIT_SECONDS", 2.0)

    def make(*arguments):
        parsed = gpu.parse(["--rehearse", "--json", str(tmp_path / "rows.jsonl"), *arguments])
        return gpu.Run(parsed, {"name": "Card 1", "torch": "2"})

    return make


def test_a_crash_a_hang_and_a_stuck_card_cost_their_own_unit_alone(started, capsys):
    run = started()
    units = ["check one", "check crash", "check two", "check stuck", "check hang", "check bad",
             "check last"]  # fmt: skip
    run.supervise(units)
    failures = {r["unit"]: r["failure"] for r in run.rows if r["kind"] == "unit"}
    assert list(failures) == units
    assert run.done == {"check one", "check two", "check last"}
    assert "its process ended with -6" in failures["check crash"]
    assert "its process ended with -9" in failures["check hang"]
    assert (
        failures["check stuck"] == "illegal access" and "1 checks failed" in failures["check bad"]
    )
    assert run.conclude(units) == gpu.FAILED
    printed = capsys.readouterr().out
    assert "WRONG check bad on triton" in printed and "FAILED check crash" in printed
    assert not run.may_time("time crash") and run.may_time("pipeline prune")
    assert started("--time-failed").may_time("time crash")
    run = started()  # again: what is done is not done again
    assert run.done == {"check one", "check two", "check last"}
    assert {row["unit"] for row in run.rows} == run.done
    other = run.rows[0] | {"source": "changed"}
    assert run.is_of_this(run.rows[0]) and not run.is_of_this(other)


def test_what_the_time_did_not_suffice_for_is_left_and_not_failed(started, monkeypatch, capsys):
    run = started()
    finish = run.finish

    def soon_over(*arguments):
        finish(*arguments)
        run.deadline = time.time() + 0.5

    monkeypatch.setattr(run, "finish", soon_over)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    monkeypatch.setattr(gpu, "UNIT_SECONDS", 60)
    units = ["check one", "pipeline hang", "pipeline last", "time two"]
    run.supervise(units)
    assert run.conclude(units) == gpu.UNFINISHED
    left = capsys.readouterr().out.splitlines()[-1]
    assert left.endswith("by the same command: pipeline hang, pipeline last")


@pytest.mark.parametrize("how", ["--rehearse", "--model=folder"])
def test_the_whole_run_with_a_fake_worker(started, monkeypatch, capsys, how):
    described = SimpleNamespace(describe=lambda: {"name": "Card 1", "torch": "2"})
    monkeypatch.setattr(gpu, "Rehearsal", lambda: described)
    monkeypatch.setattr(gpu, "Card", lambda: described)
    monkeypatch.setattr(gpu, "outdated", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_checks, "sanitized", lambda names, seconds, options: {
        "kind": "missing", "what": "compute-sanitizer", "why": "no"})  # fmt: skip
    path = started().results.path
    assert gpu.main([how, "--json", str(path)]) == 3  # the fake has no "ceilings"
    printed = capsys.readouterr().out
    assert "missing: compute-sanitizer: no" in printed
    assert "left for the next time, by the same command: ceilings" in printed
    assert gpu.main([how, "--json", str(path), "--minutes", "0"]) == gpu.UNFINISHED


def test_a_process_that_does_not_start_is_one_failure(started, monkeypatch):
    run = started()
    monkeypatch.setattr(gpu.subprocess, "Popen", _popen_of([sys.executable, "-c", "1/0"]))
    run.supervise(["check gram", "check rms_norm"])
    (row,) = run.rows
    assert "did not start" in row["failure"] and "ZeroDivisionError" in row["failure"]


def _popen_of(command):
    return lambda _, **options: POPEN(command, **options)


def test_a_cards_results_are_named_after_it_and_the_day():
    card = {"name": "NVIDIA H100 80GB HBM3", "torch": "2"}
    name = f"gpu-h100-80gb-hbm3-{gpu.timing.today()}.jsonl"
    assert gpu.Run(gpu.parse([]), card).results.path == results.FOLDER / name
    rehearsed = gpu.Run(gpu.parse(["--rehearse"]), card).results.path
    assert rehearsed.name == name and rehearsed.parent != results.FOLDER


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "gramm"])
    assert "unknown op 'gramm'" in capsys.readouterr().err


def test_the_extension_is_built_where_it_is_old_or_missing_and_a_compiler_is_there(
    started, monkeypatch, tmp_path
):
    run, asked, found = started(), [], SimpleNamespace(origin=tmp_path / "_cuda.so")
    found.origin.touch()
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    run.build()
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: path and "/usr/bin/nvcc")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: found)

    def build(command, **options):
        assert options["env"]["TAILOR_BUILD_CPU"] == "0"
        asked.append(command)
        return SimpleNamespace(returncode=int(len(asked) > 1), stderr="line\nerror")

    monkeypatch.setattr(gpu.subprocess, "run", build)
    run.build()
    assert not asked and not run.rows
    os.utime(found.origin, (0, 0))
    run.build()
    assert not run.rows
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    run.build()
    usual = ["setup.py", "--quiet", "build_ext", "--inplace"]
    assert asked[0][1:] == asked[1][1:] == usual
    assert asked[2][0] == "/usr/bin/nvcc" and "csrc/cuda/int4_linear.cu" in " ".join(asked[2])
    assert [row["why"] for row in run.rows] == ["line | error | line | error"]


def test_what_will_be_timed_is_launched_ahead_and_fails_only_where_it_is_timed(monkeypatch):
    card, calls, launch = gpu_card.Rehearsal(), [], OPS["rms_norm"].implementation("triton")

    def watched(*arguments):
        calls.append(arguments)
        assert len(calls) > 1  # the first shape's launch fails
        return launch(*arguments)

    forced = SimpleNamespace(on=lambda backend: watched)
    monkeypatch.setitem(gpu_times.OPS, "rms_norm", forced)
    monkeypatch.setattr(gpu_checks, "backends", lambda op, card: ["triton"])
    assert list(gpu_worker.run("compile rms_norm", card, "")) == []
    assert len(calls) == len(list(gpu_shapes.shapes("rms_norm", card)))


def test_times_get_their_share_of_the_limit_when_they_are_kept(started, capsys):
    run = started()
    run.keep({"unit": "ceilings", "kind": "ceilings", "rates": RATES})
    run.keep({"unit": "time gram"} | TIMED)
    run.keep({"unit": "pipeline prune", "kind": "pipeline", "what": "prune", "engine": "tailor",
              "model": "m", "ms": 1.0, "tokens_per_second": 10.0, "peak_bytes": 5e6})  # fmt: skip
    assert run.rows[1]["percent_of_limit"] == 50
    assert run.conclude([]) == 0
    printed = capsys.readouterr().out
    assert "gram, triton" in printed and "50 memory" in printed and "2.50 torch" in printed


def test_the_sanitizers_row_is_kept(started, monkeypatch):
    run = started()
    row = {"kind": "check", "op": "gram", "backend": "compute-sanitizer", "failure": "bad"}
    monkeypatch.setattr(gpu_checks, "sanitized", lambda names, seconds, options: row)
    run.sanitize([])
    assert not run.rows
    run.sanitize(["gram"])
    assert [row["failure"] for row in run.rows] == ["bad", "1 checks failed"]
