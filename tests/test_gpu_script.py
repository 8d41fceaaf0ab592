"""benchmarks.gpu where there is no GPU: its steps on the CPU, or on a fake of CUDA."""

import contextlib
import json
import stat
import sys
import types
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import (
    gpu,
    gpu_card,
    gpu_checks,
    gpu_pipeline,
    gpu_rivals,
    gpu_shapes,
    gpu_table,
    gpu_times,
    gpu_worker,
)
from benchmarks.peers import Peer
from tailor_engine.ops import OPS

RATES = {"copy": 1000.0, "bfloat16": 100.0, "float32": 10.0, "int8": 200.0}
TIMED = {"kind": "time", "op": "gram", "backend": "triton", "shape": "8x8", "us": 2.0,
         "spread": 0.1, "eager": "", "moved": 1e6, "operations": 4e6, "arithmetic": "float32",
         "logits": 0.0, "rivals": {"torch": 5.0}, "rival_spreads": {"torch": 0.1}}  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    """The CPU in a card's place, with plain torch in the kernels'."""
    monkeypatch.setattr(gpu_checks, "backends", lambda op, card: ["reference"])
    monkeypatch.setattr(gpu_rivals, "_compile", lambda function: function)
    return gpu_card.Rehearsal()


@pytest.mark.parametrize("name", ["gram", "int8_quantize", "structured_slice"])
def test_every_case_is_checked(card, name):
    card.rehearsed = False  # on several draws of it
    rows = list(gpu_checks.check(name, card))
    assert len(rows) == len(list(OPS[name].cases()))
    assert not any(row["failure"] for row in rows) and all(row["arguments"] for row in rows)


@pytest.mark.parametrize("name", gpu.kernels())
def test_every_shape_is_made_checked_and_timed(card, name):
    rows = list(gpu_times.measure(name, card))
    times = [row for row in rows if row["kind"] == "time"]
    assert len(times) == len(list(gpu_shapes.shapes(name, card))) > 0
    for row in times:
        assert row["us"] > 0 and row["rivals"] and row["moved"] > 0
        assert gpu_table.limit(row, RATES)["limit_us"] > 0
    assert not any(row["failure"] for row in rows if row["kind"] == "check")
    absent = {row["what"].split(" (")[0] for row in rows if row["kind"] == "missing"}
    assert absent <= {"gemlite", "marlin", "Liger", "torch._int_mm alone"}, rows


def test_what_no_graph_can_hold_is_timed_without_one(card, monkeypatch):
    card.capture = lambda function: pytest.fail("recorded")
    ours = {"ours": Peer(lambda: lambda: None, 1)}
    times, _ = gpu_times.compare(card, ours, {"ours": "the host's table"})
    assert times["ours"][2] == "the host's table"
    op, arguments = OPS["structured_slice"], next(OPS["structured_slice"].cases())
    gpu_checks.repeatable(op, op.reference, arguments, card)
    assert set(gpu_shapes.UNRECORDED) <= set(gpu_shapes.NAMES)


def test_every_op_with_a_kernel_has_shapes_and_units():
    assert set(gpu.kernels()) == set(gpu_shapes._SHAPES) <= set(OPS)
    assert gpu.units(["gram"]) == ["check gram", "ceilings", "time gram"]
    every = gpu.units([])
    assert every[-4:] == ["pipeline prune", "pipeline distill", "pipeline decode", "sanitizer"]
    assert len(every) == 2 * len(gpu.kernels()) + 5


def test_a_wrong_kernel_fails_its_check_and_is_not_timed(card, monkeypatch):
    rms_norm = OPS["rms_norm"]
    monkeypatch.setattr(type(rms_norm), "on", lambda op, name: _once_in_a_while_wrong(op))
    failures = {row["failure"] for row in gpu_checks.check("rms_norm", card)} - {""}
    assert failures and all("error" in f or "two runs differ" in f for f in failures)
    rows = list(gpu_times.measure("rms_norm", card))
    assert {row["kind"] for row in rows} == {"check"} and all(row["failure"] for row in rows)


def test_an_op_that_no_backend_runs_has_failed(monkeypatch):
    monkeypatch.setattr(gpu_checks, "backends", lambda op, card: [])
    missing, failed = gpu_checks.check("int4_dequantize", gpu_card.Rehearsal())
    assert missing["kind"] == "missing" and missing["why"]
    assert failed["kind"] == "check" and "TRITON_INTERPRET" in failed["failure"]


def _once_in_a_while_wrong(op):
    calls = iter(range(10**6))

    def function(*arguments):
        return op.reference(*arguments) * (1 + 0.1 * (next(calls) + 1))

    return function


def test_a_replay_that_differs_from_the_first_run_is_a_failure(card, monkeypatch):
    def capture(function):
        result = function()
        return lambda: result.add_(1), result

    monkeypatch.setattr(card, "capture", capture, raising=False)
    op, arguments = OPS["rms_norm"], next(OPS["rms_norm"].cases())
    with pytest.raises(AssertionError, match="a CUDA graph's replay differs"):
        gpu_checks.repeatable(op, op.reference, arguments, card)


def test_draws_differ_in_values_alone():
    op = OPS["channel_stats"]
    declared, zero, other = list(op.cases()), *(
        gpu_checks.cases(op, gpu_card.Rehearsal(), seed) for seed in (0, 5)
    )  # fmt: skip
    for plain, same, fresh in zip(declared, zero, other, strict=True):
        assert torch.equal(plain[0], same[0])
        assert (plain[0].shape, plain[0].stride()) == (fresh[0].shape, fresh[0].stride())
        assert plain[0].storage_offset() == fresh[0].storage_offset()
    assert not torch.equal(zero[-1][0], other[-1][0])
    assert len(set(gpu_checks.seeds(gpu_checks.DRAWS))) == gpu_checks.DRAWS
    assert torch.Generator().manual_seed(0).initial_seed() == 0


def test_unwritten_outputs_are_poisoned():
    with gpu_checks.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("part", gpu_pipeline.PARTS)
def test_the_pipeline_beside_plain_torch(card, part):
    rows = list(gpu_worker.run(f"pipeline {part}", card, ""))
    assert [row["failure"] for row in rows if row["kind"] == "check"] == [""]
    engines = {(row["what"], row["engine"]) for row in rows if row["kind"] == "pipeline"}
    assert len(engines) == {"prune": 3, "distill": 2, "decode": 4}[part], rows
    for row in rows:
        assert row["kind"] == "check" or row["tokens_per_second"] > 0


def test_decoding_that_no_graph_can_hold_is_missing_there_alone(card):
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    card.capture = refuse
    rows = list(gpu_pipeline.decode(card, ""))
    assert [row["what"] for row in rows if row["kind"] == "pipeline"] == ["decode"] * 2
    missing = [row for row in rows if row["kind"] == "missing"]
    assert len(missing) == 2 and all("not permitted" in row["why"] for row in missing)


def test_the_pipelines_model_is_the_users_the_packages_or_random(monkeypatch):
    card = SimpleNamespace(device=torch.device("cpu"), rehearsed=False)
    monkeypatch.setattr(gpu_pipeline, "ONE_BILLION", gpu_pipeline.TINY)
    refused = gpu_pipeline.tailor_engine.UserError("not here")

    def load(name):
        if name != "known":
            raise refused
        return gpu_pipeline._random(card, gpu_pipeline.TINY)

    monkeypatch.setattr(gpu_pipeline.tailor_engine, "load", load, raising=False)
    assert gpu_pipeline.model_of(card, "known")[1] == "known"
    assert gpu_pipeline.model_of(card, "")[1] == "a random Llama of 1.2 billion"
    with pytest.raises(gpu_pipeline.tailor_engine.UserError):
        gpu_pipeline.model_of(card, "unknown")
    assert gpu_pipeline.same("x", [torch.ones(2)], [torch.zeros(2) + 2])["failure"]


def test_ceilings_and_a_rate_that_is_not_there(card, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", _refuse)
    (row,) = gpu_worker.run("ceilings", card, "")
    rates = row["rates"]
    assert rates["torch._int_mm"] == 0 and rates["int8"] == 2 * rates["bfloat16"] > 0
    assert rates["copy"] > 0 and rates["float32"] > 0


def _refuse(*_, **__):
    raise RuntimeError("no kernel for it")


def test_the_limit_is_the_larger_floor_and_a_loss_waits_for_both():
    assert gpu_table.limit(TIMED, RATES)["limit"] == "memory"
    assert gpu_table.limit(TIMED, RATES)["percent_of_limit"] == pytest.approx(50)
    more = TIMED | {"operations": 4e7}
    assert gpu_table.limit(more, RATES) == {
        "limit": "float32", "limit_us": 4.0, "percent_of_limit": 200.0
    }  # fmt: skip
    loss = more | {"logits": 1e6}
    assert gpu_table.limit(loss, RATES)["limit_us"] == pytest.approx(4 + 14)


def test_rivals_that_are_here_are_called(monkeypatch, card):
    made = []

    class Layer(torch.nn.Module):
        def __init__(self, *_, **options):
            super().__init__()
            made.append(options)
            self.B, self.s = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2)

        def pack(self, *_):
            made.append("packed")

        def forward(self, x, *_):
            return x.sum()

    gemlite = types.ModuleType("gemlite.core")
    gemlite.TORCH_TO_DTYPE, gemlite.GemLiteLinear = {torch.bfloat16: 1}, Layer
    gemlite.set_autotune = made.append
    liger = types.ModuleType("liger_kernel.transformers.fused_linear_jsd")
    liger.LigerFusedLinearJSD = lambda **options: lambda s, w, t, v: (s @ w.T).sum()
    for name, module in {
        "gemlite": types.ModuleType("gemlite"), "gemlite.core": gemlite,
        "marlin": SimpleNamespace(Layer=Layer),
        "liger_kernel": types.ModuleType("liger_kernel"),
        "liger_kernel.transformers": types.ModuleType("liger_kernel.transformers"),
        "liger_kernel.transformers.fused_linear_jsd": liger,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("int4_linear", "linear_kl"):
        rows = [row for row in gpu_times.measure(name, card) if row["kind"] == "time"]
        assert {"gemlite", "marlin (fp16)"} <= set(rows[0]["rivals"]) or "Liger" in rows[0][
            "rivals"
        ]
    assert "fast" in made and "packed" in made


def test_torchs_integer_product_is_a_rival_of_many_tokens():
    data, scale = torch.ones(8, 64, dtype=torch.int8), torch.ones(8)
    for tokens, here in ((16, False), (32, True)):
        arguments = torch.ones(tokens, 64), data, scale, None, "canonical", True
        found = gpu_rivals.rivals("int8_linear", arguments, first=False)
        assert ("torch._int_mm alone" in found) is here
    assert found["torch._int_mm alone"].make()().shape == (32, 8)


def test_weights_lie_in_panels_where_the_cuda_kernels_read_them(card, monkeypatch):
    monkeypatch.setattr(type(OPS["int4_linear"]), "missing", lambda *_: "")
    for name in ("int4_linear", "int8_linear"):
        shape = next(gpu_shapes.shapes(name, card))
        assert shape.label.endswith("panels")
        arguments = shape.make()
        assert gpu_times.wrong(OPS[name], "reference", shape, arguments) == ""
        assert gpu_rivals.rivals(name, arguments, first=True)["torch bf16"].make()().numel()


def test_a_rival_that_fails_is_missing_and_one_that_cannot_be_recorded_is_timed_eagerly(card):
    def recorded_never(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    card.capture = recorded_never
    peers = {"plain": Peer(lambda: lambda: None, 1), "bad": Peer(lambda: _refuse, 1)}
    times, stopped = gpu_times.compare(card, peers, {})
    assert list(times) == ["plain"] and "not permitted" in times["plain"][2]
    assert stopped == {"bad": "RuntimeError: no kernel for it"}
    assert gpu_times.compare(card, {"bad": peers["bad"]}, {})[0] == {}


def test_a_kernel_that_cannot_be_timed_is_a_failure(card, monkeypatch):
    monkeypatch.setattr(gpu_times, "compare", lambda *_: ({}, {"reference": "too large"}))
    rows = list(gpu_times.measure("rms_norm", card))
    assert {row["failure"] for row in rows} == {"", "could not be timed: too large"}


def test_kernels_of_ours_are_listed_with_what_they_take():
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    taken = SimpleNamespace(n_regs=64, n_spills=0, metadata=SimpleNamespace(
        shared=1024, num_warps=4, num_stages=3))  # fmt: skip
    try:
        JITFunction.run = lambda self, *_, **__: taken
        compiled = gpu_worker.watched()
        for module in ("tailor_engine.kernels.gram", "gemlite.kernels"):
            function = SimpleNamespace(__module__=module, __name__="product_kernel")
            JITFunction.run(SimpleNamespace(fn=function))
    finally:
        JITFunction.run = launch
    (row,) = gpu_worker.fresh(compiled)
    assert row["kernel"] == "gram.product_kernel" and row["registers"] == 64
    assert list(gpu_worker.fresh(compiled)) == []
    text = gpu_table._kernels({"kernel": [row, row | {"registers": 80}]})
    assert text == [("gram.product_kernel", 80, 0, 1024, 4, 3)]


def test_the_sanitizer_when_it_is_there_when_not_and_when_it_finds_something(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_checks, "SANITIZER", "sanitizer-of-the-test")
    assert gpu_checks.sanitized(["rms_norm"], 60, [])["kind"] == "missing"
    tool = tmp_path / "sanitizer-of-the-test"
    for script, kind, words in (
        ("exit 0", "check", ""),
        ("echo Invalid read of size 4; exit 87", "check", "exit 87: Invalid read of size 4"),
        ("exec /bin/sleep 5", "missing", ""),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
        row = gpu_checks.sanitized(["rms_norm"], 1.0, ["--rehearse"])
        assert row["kind"] == kind and row.get("failure", "") == words


def test_what_the_sanitizer_watches(card, monkeypatch):
    monkeypatch.setattr(gpu_worker, "own_kernels", lambda: None)
    gpu_checks.main(["--rehearse", "rms_norm", "channel_stats"])


class FakeCuda:
    """What the script asks of torch.cuda, with a clock that a call moves by ten microseconds."""

    def __init__(self):
        self.now, self.capturing, self.replays, self.replay_ms = 0.0, False, 0, 1.0

    def Event(self, enable_timing):
        assert enable_timing
        outer = self

        class Event:
            def record(self):
                self.at = outer.now

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()

    def CUDAGraph(self):
        def replay():
            self.replays += 1
            self.now += self.replay_ms

        return SimpleNamespace(replay=replay)

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.capturing = True
        yield
        self.capturing = False

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def synchronize(self):
        pass

    empty_cache = reset_peak_memory_stats = synchronize

    def mem_get_info(self):
        return 5 << 30, 80 << 30

    def memory_allocated(self):
        return 100

    def max_memory_allocated(self):
        return 150

    def get_device_properties(self, device):
        return SimpleNamespace(name="NVIDIA Fake 100", major=9, minor=0, multi_processor_count=132,
                               total_memory=80 << 30, L2_cache_size=50 << 20)  # fmt: skip


def test_a_card_times_graphs_by_events(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    card = gpu_card.Card()
    described = card.describe()
    assert described["name"] == "NVIDIA Fake 100" and described["cache_bytes"] == 50 << 20
    assert json.dumps(described)
    assert card.free_bytes() == 5 << 30 and card.size(7) == 7
    assert card.peak_bytes(lambda: "result") == ("result", 50)
    calls = []

    def call():
        calls.append(cuda.capturing)
        cuda.now += 0.01  # milliseconds

    estimate = gpu_card.once(card, call)
    assert estimate == pytest.approx(10)
    replay, count, why = gpu_card.stretch(card, [call] * 4, estimate)
    assert (count, why) == (100, "") and calls.count(True) == 100  # a millisecond, in whole turns
    times = gpu_card.interleaved(card, {"ours": (replay, count)}, 0.0)
    assert times["ours"][0] == pytest.approx(10) and times["ours"][1] == pytest.approx(0)
    assert cuda.replays == 2 + 1 + 2 * 7  # once to know its length, warm, each behind another
    cuda.replay_ms = 0.02  # far less than the calls' own start made it look
    assert gpu_card.stretch(card, [call] * 4, 100.0)[1] == 4 * 100
    assert gpu_times.copies(card, 32 << 20, 2) == 5  # three caches, in a quarter of the memory
    assert gpu_times.copies(card, 2 << 30, 2) == 1 and gpu_times.copies(card, 1, 2) == 256
