"""One device a run, and a training step that waits for it once: counted through fakes, on the CPU.

Where there is a GPU, CUDA itself counts.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.train import Ours
from tailor_engine import model as models
from tailor_engine import ops, pipeline
from tailor_engine.errors import UserError
from tailor_engine.ops import _linear_loss, _op
from tailor_engine.stages import _mask, _objective, _train
from tailor_engine.stages._stage import _peak_of
from tailor_engine.stages._train_config import TrainConfig
from tailor_engine.stages.prune import statistics
from tests.tiny import tiny

CPU = torch.device("cpu")
WAITING = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal", "masked_select",
           "unique_dim", "_unique2", "unique_consecutive"}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes each operation that makes the host wait for a GPU's answer."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        lengths = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or lengths:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def rows_of(model, packed=True):
    """Return rows of two documents each, with unlabelled tokens and a row cut short."""
    ids = torch.randint(6, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(24).expand(8, -1).clone()
    if packed:
        positions[:, 10:] -= 10
    labels = ids.roll(-1, 1)
    labels[:, :4] = labels[2, 12:] = -100
    return _objective.CachedRows(ids, positions, labels)


def as_on_a_gpu(monkeypatch):
    """Let the step take the way that it takes on a GPU, as far as the CPU can go it."""
    monkeypatch.setattr(_mask, "is_ours", lambda network, device: True)
    monkeypatch.setattr(_linear_loss, "_graph_is_kept", lambda: True)  # its item() is the CPU's
    taken = _train.take

    def take(*arguments):
        with _disable_current_modes():  # rows lie on the host
            return taken(*arguments)

    monkeypatch.setattr(_train, "take", take)


def step_of(dtype, device=CPU, **settings):
    model = tiny().to(device)
    config = TrainConfig(steps=100, gradient_accumulation=2, **settings)
    ours = Ours(model, rows_of(model), dtype, config)
    ours.step()  # AdamW makes its moments, accelerate its own state
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_waits_once(monkeypatch, dtype):
    as_on_a_gpu(monkeypatch)
    reads, tolist = [], torch.Tensor.tolist

    def read(tensor):
        reads.append(tuple(tensor.shape))
        return tolist(tensor)

    with ops.backend("reference"):
        ours = step_of(dtype)
        monkeypatch.setattr(torch.Tensor, "tolist", read)
        with Waits() as waits:
            ours.step()
    assert waits.found == []
    # The rows' indices are the host's; loss, divergence and the gradient's norm come together.
    assert reads == [(4,), (3,)]


def test_the_count_would_see_a_wait():
    x = torch.arange(3.0)
    with Waits() as waits:
        assert float(x.sum()) == 3 and bool(x[0] == 0) and x[x > 1].sum().item() == 2
        x.nonzero()
    assert waits.found == ["_local_scalar_dense"] * 2 + ["index", "_local_scalar_dense", "nonzero"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_training_step_on_a_gpu_waits_once(monkeypatch):
    ours = step_of(torch.bfloat16, torch.device("cuda"))
    read = _train._Training._sum_over_processes

    def allowed(*arguments, **options):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(_train._Training, "_sum_over_processes", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.dtype == torch.float32 for p in ours.training.trained.values())


@pytest.mark.parametrize("packed", [True, False])
def test_the_mask_that_we_hand_over_is_the_one_that_transformers_makes(monkeypatch, packed):
    model = tiny()
    batch = _train.take(rows_of(model, packed), torch.arange(8), CPU)
    states = []
    for ours in (False, True):
        monkeypatch.setattr(_mask, "is_ours", lambda *_, ours=ours: ours)
        with torch.no_grad():
            found = _objective.final_states(model.network, model.family, batch, torch.float32, [1])
        states.append((found[0], found[1][1]))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_pass_for_statistics_waits_once_for_all_blocks(monkeypatch):
    monkeypatch.setattr(_mask, "is_ours", lambda *_: True)
    model, rows = tiny(), rows_of(tiny())
    valid = torch.ones(rows.labels.numel(), dtype=torch.bool)
    batch = statistics.Batch(rows.input_ids, rows.position_ids, valid)
    with ops.backend("cpu.baseline"), Waits() as waits:
        statistics.collect(model.family, model.network, [batch, batch], gram=True)
    assert waits.found == []  # the sums are looked at by one tolist


def test_who_makes_the_mask():
    llama, mistral = tiny("llama").network, tiny("mistral").network
    assert _mask.is_ours(llama, "cuda")
    assert not _mask.is_ours(llama, "cpu")  # without a mask it is faster there
    assert not _mask.is_ours(mistral, "cuda")  # its layers see a window


def test_labelled_tokens_are_those_with_a_label():
    model = tiny()
    rows = rows_of(model)
    batch = _train.take(rows, torch.arange(4), CPU)
    keep = batch["labels"] != -100
    for name in ("input_ids", "labels"):
        assert torch.equal(_objective.labelled(batch, batch[name]), batch[name][keep])


def test_a_device_is_chosen_once(monkeypatch):
    assert models.choose_device("cpu") == CPU
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert models.choose_device() == torch.device("cuda", 0)
    assert models.choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert models.choose_device("cuda") == torch.device("cuda", 1)
    assert chosen == [0, 1, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.choose_device() == CPU
    with pytest.raises(UserError, match="device 'cuda:2' was asked for; torch sees 2 CUDA GPUs"):
        models.choose_device("cuda:2")
    for wrong in ("gpu", "cuda:x", "cuda:-1"):
        with pytest.raises(UserError, match="device must be auto, cpu, cuda or cuda:N"):
            models.choose_device(wrong)


def test_what_a_store_keeps_comes_back_to_the_device_of_the_base():
    loaded, base = tiny(), tiny().to("meta")
    walk = pipeline._Walk.__new__(pipeline._Walk)
    walk.base = base
    walk.store = SimpleNamespace(load=lambda name, part="model": loaded.replace(teacher=tiny()))
    found = walk.load("1-prune", "teacher")
    assert found.device.type == "meta" and found.teacher.device.type == "meta"


def test_kernels_start_on_the_card_of_their_tensors(monkeypatch):
    """Tensors of the second card while the first is the current one."""
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(_op, "_run", lambda declared, kind, arguments: kind)
    for card in (0, 1):
        monkeypatch.setattr(_op, "_device", lambda *_, card=card: torch.device("cuda", card))
        assert _op._started("gram", ()) == "cuda"
    assert entered == [torch.device("cuda", 1)]


def test_the_peak_of_a_stage_is_the_memory_of_its_device(monkeypatch):
    assert _peak_of(CPU)() > 1 << 20
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    card = torch.device("cuda", 0)
    assert _peak_of(card)() == 7 and asked == [card]
