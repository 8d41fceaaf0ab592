"""Measured kernel configurations: made by the bench, kept a card, used only when asked for."""

import sys
import time
import types

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import gpu_card, tune
from tailor_engine.errors import UserError
from tailor_engine.io import tuned
from tailor_engine.ops import OPS, _tuned


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel of rms_norm whose second candidate is the fastest, and whose third is wrong."""
    module = types.ModuleType("tailor_engine.kernels.rms_norm")

    def launch(x, weight, epsilon, offset, chosen=None):
        chosen = chosen or module.config(*x.shape)
        time.sleep(chosen["milliseconds"] / 1000)
        return OPS["rms_norm"].reference(x, weight, epsilon, offset) + chosen.get("wrong", 0)

    module.launch = launch
    module.config = lambda tokens, channels: {"milliseconds": 6}
    module.candidates = lambda tokens, channels: [
        {"milliseconds": 6}, {"milliseconds": 1}, {"milliseconds": 0, "wrong": 1}
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return module


def test_the_fastest_right_candidate_is_kept_and_used_when_it_is_asked_for(kernel, monkeypatch):
    *lines, last = tune.run(("rms_norm",), gpu_card.Rehearsal())
    assert len(lines) == 2 and all("by {'milliseconds': 1}" in line for line in lines)
    assert last == f"kept: {tuned.path('rehearsal')}"
    table = tuned.read("rehearsal")
    shape = OPS["rms_norm"], (32, 16)
    assert kernel.config(*shape[1]) == {"milliseconds": 6}  # nobody asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "rehearsal")
    tuned.use_if_asked()
    assert kernel.config(*shape[1]) == {"milliseconds": 6}
    monkeypatch.setenv(tuned.ASKED, "1")
    tuned.use_if_asked()
    assert kernel.config(*shape[1]) == {"milliseconds": 1}
    assert kernel.config(999, 999) == {"milliseconds": 6}  # what was not measured is reasoned
    _tuned.use(table)
    assert kernel.config(*shape[1]) == {"milliseconds": 1}
    tuned.keep("rehearsal", {"gram": {"[]": {"warps": 4}}})
    assert set(tuned.read("rehearsal")) == {"gram", "rms_norm"}


def test_a_kernel_without_candidates_or_without_a_choice_is_left_as_it_is(kernel):
    kernel.launch = lambda *arguments, chosen=None: OPS["rms_norm"].reference(*arguments)
    *lines, _ = tune.run(("rms_norm",), gpu_card.Rehearsal())
    assert [line.endswith("no choice") for line in lines] == [True, True]
    del kernel.candidates
    first, _ = tune.run(("rms_norm",), gpu_card.Rehearsal())
    assert first == "rms_norm: its kernel lists no candidates"
    assert tuned.read("rehearsal") == {}


def test_a_reasoned_configuration_that_is_wrong_is_no_measure_for_others(kernel):
    kernel.config = lambda tokens, channels: {"milliseconds": 0, "wrong": 1}
    *lines, _ = tune.run(("rms_norm",), gpu_card.Rehearsal())
    assert all(line.endswith("no choice") for line in lines)


def test_without_a_gpu_or_a_measurement_it_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--tune"]) == 2
    assert "--tune needs a CUDA GPU" in capsys.readouterr().err
    monkeypatch.setenv(tuned.ASKED, "1")
    with pytest.raises(UserError, match="TAILOR_TUNED was asked for, but there is no CUDA GPU"):
        tuned.use_if_asked()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    with pytest.raises(UserError, match="nothing was measured on Card; run `tailor bench --tune`"):
        tuned.use_if_asked()
