"""The benches of whole networks, on tiny ones: what they measure, not how fast it is."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import decode_profile, engines, train
from benchmarks.timing import machine
from tailor_engine.data import Data
from tailor_engine.stages import get
from tests.tiny import tiny
from tests.two_processes import tiny_data

IDS = list(range(6, 30))


@pytest.fixture(scope="module")
def network():
    config = {"bits": 8, "rows": 0, "method": "nearest", "clip_search": False}
    return get("quantize")(tiny(), config, None)[0].network


def test_an_engine_decodes_greedily_from_the_start_each_time(network):
    engine = engines.TorchEngine(network)
    expected = network.generate(
        torch.tensor([IDS]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0,
        suppress_tokens=None, eos_token_id=None,
    )[0, len(IDS) :].tolist()  # fmt: skip
    for _ in range(2):
        assert [engine.prefill(IDS), *(engine.step() for _ in range(4))] == expected


def test_a_wrong_network_is_not_timed(network):
    assert engines.check(network, IDS) < 0.2

    class Wrong:
        calls = 0

        def __call__(self, ids):
            self.calls += 1
            return SimpleNamespace(logits=torch.ones(3) * (1.0 if self.calls == 1 else 2.0))

    with pytest.raises(RuntimeError, match=r"differ from the reference backend by 0\.5"):
        engines.check(Wrong(), IDS)


def test_a_missing_peer_is_listed(monkeypatch, tmp_path):
    def absent(*_):
        raise ImportError("No module named 'llama_cpp'")

    monkeypatch.setattr(engines, "_requantized", absent)
    names = ("transformers fp32", "llama.cpp Q4_0")
    made, missing = engines.engines(tiny(), tmp_path, names)
    assert list(made) == ["transformers fp32"]
    assert missing == ["llama.cpp Q4_0: not here (No module named 'llama_cpp')"]


def test_the_clock_charges_each_part_with_its_own_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(decode_profile.time, "perf_counter", lambda: now[0])
    clock = decode_profile.Clock()

    def spend(seconds):
        now[0] += seconds

    inner = clock.around("inner", spend)

    def outer():
        spend(1)
        inner(2)
        inner(3)

    clock.around("outer", outer)()
    assert clock.seconds == {"inner": 5, "outer": 1}
    assert clock.calls == {"inner": 2, "outer": 1}


def test_the_parts_of_a_step_add_up_to_it_and_leave_no_trace(network):
    network.eval()
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    engine, rows = engines.TorchEngine(network), []
    modules = engines.TorchEngine(decode_profile.by_modules(network))
    unfused = engines.TorchEngine(decode_profile.unfused(network))
    for name, each in (("as loaded", engine), ("by modules", modules), ("unfused", unfused)):
        each.prefill(IDS)
        plain, total, parts = decode_profile.profile(each, each.step, 3)
        assert plain > 0 and 0.5 * total < sum(ms for _, ms, _ in parts) <= total
        numbers = {"ms": plain, "ms_with_clocks": total, "parts": parts, "machine": machine()}
        numbers |= {"weights_mb": 1.0, "read_gbps": 10.0}
        rows.append({"what": "a token", "network": name, "threads": 1} | numbers)
    labels = [{label for label, _, _ in row["parts"]} for row in rows]
    assert {"linear layers, kernel", "attention, kernel", "KV cache, torch.cat"} <= labels[1]
    assert "native step, kernel" in labels[0] and "attention, kernel" not in labels[0]
    assert {name: dict(vars(module)) for name, module in network.named_modules()} == before
    text = decode_profile.page(rows)
    assert "## a token, threads: 1" in text and "| attention, torch's | | | " in text
    assert "1 MB: 0.10 ms at the 10 GB/s" in text


def test_the_page_is_in_step_with_its_results_file():
    newest = max((decode_profile.PAGE.parent / "results").glob("decode-profile-*.jsonl"))
    assert decode_profile.PAGE.read_text() == decode_profile.page(decode_profile.read(newest))


def test_a_training_step_of_ours_and_of_plain_torch_have_the_same_loss():
    data: Data = tiny_data()
    teacher = tiny()
    rows = data.mixed("train", teacher.tokenizer, 32, 16, 0.5)
    steps = [kind(teacher, rows, torch.float32) for kind in (train.Ours, train.Plain)]
    for each in steps:
        with each.marked():
            each.step()
        assert list(each.phases.samples) and set(each.phases.samples) == set(train.PHASES)
    ours, plain = steps[0].training.history.curves["loss"], steps[1].losses
    assert ours == pytest.approx(plain, rel=1e-4) and plain[0] > 1e-4
