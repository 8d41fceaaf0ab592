"""Linears that read one input and run as one: the same bits, files and modules as apart."""

import copy

import pytest
import torch

from tailor_engine.modules import FusedLinears, QuantizedLinear
from tailor_engine.ops.packed import PackedWeight

KINDS = [(8, 0, True), (4, 32, True), (4, 64, False)]
FEATURES = (48, 16, 23)


def linears(bits, group, symmetric, bias=False, features=FEATURES):
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in features:
        weight = torch.randn(count, 130, generator=generator)
        packed = PackedWeight.quantize(weight, bits, group, symmetric)
        made.append(QuantizedLinear(packed, torch.randn(count) if bias else None))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_same_bits_as_apart(kind, bias, guard):
    parts = linears(*kind, bias)
    apart = copy.deepcopy(parts)
    fused = FusedLinears.of(parts)
    assert fused is not None
    for shape in ((1, 1, 130), (2, 9, 130), (130,)):
        for dtype in (torch.float32, torch.bfloat16):
            with guard():
                x = torch.randn(shape).to(dtype)
                for order in ((0, 1, 2), (2, 0, 0, 1)):
                    for i in order:
                        y = parts[i](x)
                        assert torch.equal(y, apart[i](x))
                        y.zero_()  # whoever got it may write into it
    with_gradients = torch.randn(3, 130, requires_grad=True)
    assert torch.equal(parts[1](with_gradients), apart[1](with_gradients))
    for one, other in zip(parts, apart, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])


@torch.no_grad()
def test_computed_once_and_again_when_the_input_changes(monkeypatch):
    parts = linears(8, 0, True)
    apart = copy.deepcopy(parts)
    FusedLinears.of(parts)
    calls = []
    plain = PackedWeight.linear
    monkeypatch.setattr(PackedWeight, "linear", lambda *a: calls.append(a[0].shape[0]) or plain(*a))
    x = torch.randn(2, 130)
    for part in parts:
        part(x)
    assert calls == [sum(FEATURES)]
    parts[0](x)
    x.mul_(2)
    assert torch.equal(parts[1](x), apart[1](x))
    assert calls.count(sum(FEATURES)) == 3
    twin = copy.deepcopy(parts[2])
    twin.packed = linears(4, 32, True)[2].packed  # another weight than the one that was fused
    assert torch.equal(twin(x), twin.packed.linear(x))


def test_what_cannot_lie_in_one_weight_stays_apart():
    assert FusedLinears.of(linears(8, 0, True, features=(17, 16))) is None
    mixed = [linears(8, 0, True)[0], linears(4, 32, True)[1]]
    before = [linear.packed for linear in mixed]
    assert FusedLinears.of(mixed) is None
    assert [linear.packed for linear in mixed] == before
    with_bias, without = linears(8, 0, True, True)[0], linears(8, 0, True)[1]
    assert FusedLinears.of([with_bias, without]) is None
