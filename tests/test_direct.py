"""A call skips torch's dispatcher only where the dispatcher would do nothing for it."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from tailor_engine import ops
from tailor_engine.ops import OPS, _op
from tailor_engine.ops._direct import is_direct, signature

WEIGHT = torch.ones(4, 32)


def direct(*args, op="int4_quantize"):
    return is_direct(signature(op), args)


def test_plain_calls_are_direct():
    assert direct(WEIGHT, 32)
    assert direct(torch.nn.Parameter(WEIGHT, requires_grad=False), 32, True, None)
    assert direct([WEIGHT], [None], [torch.tensor([1])], op="structured_slice")
    with torch.no_grad():
        assert direct(torch.nn.Parameter(WEIGHT), 32)


@pytest.mark.parametrize(
    "args",
    [
        (),
        (None, 32),
        (WEIGHT, 32.0),
        (WEIGHT, torch.tensor(32)),
        (WEIGHT, 32, True, None, None),
        (torch.nn.Parameter(WEIGHT), 32),
        (WEIGHT.to("meta"), 32),
        (torch.imag(torch.ones(4, 32, dtype=torch.complex64).conj()), 32),
        (torch.nn.Buffer(WEIGHT).as_subclass(type("Own", (torch.Tensor,), {})), 32),
    ],
)
def test_others_are_not(args):
    assert not direct(*args)


def test_nothing_is_direct_while_torch_watches():
    class Mode(TorchFunctionMode):
        pass

    seen = []

    def see(x):
        seen.append(direct(WEIGHT, 32))
        return x.sum()

    with FakeTensorMode():
        seen.append(direct(WEIGHT, 32))
    with Mode():
        seen.append(direct(WEIGHT, 32))
    with forward_ad.dual_level():
        see(WEIGHT)
    torch.vmap(see)(WEIGHT)
    torch.func.grad(see)(WEIGHT)
    torch.jit.trace(see, (WEIGHT,), check_trace=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        see(WEIGHT)
    assert seen and not any(seen)


def test_a_direct_call_keeps_the_border():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="x must have 2 dimensions"):
        ops.channel_stats(x[0], None, torch.zeros(5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # ends at the op: float32 products inside
        gram = torch.zeros(4, 4)
        OPS["gram"].on("reference")(x, None, gram)
    assert torch.equal(gram, x.T @ x)
    dequantized = ops.fake_quantize(WEIGHT.clone().requires_grad_(), 4, 32)
    assert dequantized.requires_grad


def test_the_thread_count_is_read_at_each_call(monkeypatch):
    for count in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert _op.threads() == count
