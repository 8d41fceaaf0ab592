"""PackedWeight, its layouts and the clip search; gradients of the linears over packed weights."""

import itertools
from dataclasses import replace

import pytest
import torch

from tailor_engine import ops
from tailor_engine.ops import _layout as layouts
from tailor_engine.ops.packed import PackedWeight, search_clip

KINDS = [(8, 0, True), *itertools.product((4,), (32, 64, 128), (True, False))]
SHAPES = [(1, 32), (16, 64), (33, 200), (7, 130), (50, 576)]
kinds = pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)


def weight_of(features, width, seed=0):
    return torch.randn(features, width, generator=torch.Generator().manual_seed(seed))


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_are_permutations_and_agree(bits, group, symmetric, shape):
    packed = PackedWeight.quantize(weight_of(*shape), bits, group, symmetric)
    panels = packed.to_layout("cpu")
    back = panels.to_layout("canonical")
    for name in ("data", "scale", "zero"):
        before, after = getattr(packed, name), getattr(back, name)
        assert (before is None and after is None) or torch.equal(before, after), name
    dense = packed.dequantize()
    assert dense.shape == shape
    assert torch.equal(panels.dequantize(), dense)
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    for either in (packed, panels):
        assert torch.equal(either.rows(ids), dense[ids])
        assert either.rows(ids, torch.bfloat16).dtype == torch.bfloat16


@kinds
def test_values_are_those_of_fake_quantize(bits, group, symmetric):
    weight = weight_of(40, 256)
    groups = (40, 256 // group) if group else (40,)
    for clip in (None, 0.6 + 0.4 * torch.rand(groups)):
        packed = PackedWeight.quantize(weight, bits, group, symmetric, clip)
        for dtype in (torch.float32, torch.bfloat16):
            fake = ops.fake_quantize(weight, bits, group, symmetric, clip).to(dtype)
            assert torch.equal(packed.dequantize(dtype), fake)
    step = packed.scale.float().max() * (1 if bits == 8 else 1.001)
    inside = PackedWeight.quantize(weight, bits, group, symmetric).dequantize()
    assert (inside - weight).abs().max() <= step


@kinds
def test_tensors_bring_it_back(bits, group, symmetric):
    packed = PackedWeight.quantize(weight_of(33, 200), bits, group, symmetric)
    tensors, metadata = packed.to_layout("cpu").tensors(), packed.metadata()
    back = PackedWeight.from_tensors(tensors, metadata)
    assert torch.equal(back.dequantize(), packed.dequantize())
    assert (back.shape, back.size_bytes) == ((33, 200), packed.size_bytes)
    assert all(isinstance(value, str) for value in metadata.values())
    with pytest.raises(ValueError, match="tensor 'scale' is missing"):
        PackedWeight.from_tensors({"data": packed.data}, metadata)
    with pytest.raises(ValueError, match="data must be"):
        PackedWeight.from_tensors({**tensors, "data": packed.data[1:]}, metadata)
    with pytest.raises(ValueError, match="damaged metadata"):
        PackedWeight.from_tensors(tensors, {"bits": "4"})


@kinds
def test_linear_is_near_the_dense_one(bits, group, symmetric):
    weight, bias = weight_of(50, 200), weight_of(1, 50, 1)[0]
    x = weight_of(6, 200, 2)
    packed = PackedWeight.quantize(weight, bits, group, symmetric)
    dense = torch.nn.functional.linear(x, packed.dequantize(), bias)
    for either, exact in itertools.product((packed, packed.to_layout("cpu")), (True, False)):
        y = either.linear(x, bias, quantize_activations=not exact)
        with torch.inference_mode():
            assert torch.equal(either.linear(x, bias, quantize_activations=not exact), y)
        error = (y - dense).norm() / dense.norm()
        assert error < (1e-6 if exact else 0.02)
    with pytest.raises(ValueError, match="x must have 200 columns"):
        packed.linear(x[:, :100])


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_gradients(bits, group, layout):
    packed = PackedWeight.quantize(weight_of(6, 40), bits, group).to_layout(layout)
    x = weight_of(3, 40, 1).double().requires_grad_()
    bias = weight_of(1, 6, 2)[0].double().requires_grad_()
    # Weight-only is differentiable everywhere; rounding x is a staircase that the declared
    # gradient steps over (straight-through), so there the two gradients are compared instead.
    assert torch.autograd.gradcheck(lambda *a: packed.linear(*a, False), (x, bias))
    upstream = weight_of(3, 6, 3).double()
    exact, through = (
        torch.autograd.grad(packed.linear(x, bias, quantized), (x, bias), upstream)
        for quantized in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(exact, through, strict=True))


def test_fake_quantize_passes_the_gradient_straight_through():
    x = weight_of(4, 64).requires_grad_()
    upstream = weight_of(4, 64, 1)
    (gradient,) = torch.autograd.grad(ops.fake_quantize(x, 4, 32), x, upstream)
    assert torch.equal(gradient, upstream)


@kinds
def test_clip_search_never_loses(bits, group, symmetric):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(30, 200, generator=generator) ** 3
    importance = torch.rand(200, generator=generator) ** 4

    def error(clip):
        values = PackedWeight.quantize(weight, bits, group, symmetric, clip).dequantize()
        return ((values - weight) ** 2 * importance).sum().item()

    clip = search_clip(weight, bits, group, symmetric, importance)
    assert clip.shape == ((30,) if bits == 8 else (30, -(-200 // group)))
    assert error(clip) <= error(None)
    assert bits == 8 or error(clip) < 0.9 * error(None)
    assert error(clip) <= error(search_clip(weight, bits, group, symmetric))
    with pytest.raises(ValueError, match=r"importance must have shape \[200\]"):
        search_clip(weight, bits, group, symmetric, importance[1:])


def test_wrong_kinds_are_refused():
    weight = torch.ones(2, 64)
    for bits, group, symmetric, words in (
        (3, 32, True, "bits must be 4 or 8"),
        (4, 0, True, "group must be one of 32, 64, 128 for 4 bits, got 0"),
        (8, 32, True, "8 bits are symmetric with one scale a row"),
    ):
        with pytest.raises(ValueError, match=words):
            PackedWeight.quantize(weight, bits, group, symmetric)
    packed = PackedWeight.quantize(weight, 8)
    with pytest.raises(ValueError, match="layout must be one of canonical, cpu"):
        packed.to_layout("gpu")
    assert replace(packed, layout="canonical").to("cpu").layout == "canonical"
