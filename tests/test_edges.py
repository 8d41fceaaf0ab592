"""Every C++ kernel at every length up to two vectors and a tail, and at every alignment.

Operands lie at the very end of allocations of exactly their size, so that under `make sanitize` a
kernel that reads or writes one element too many is caught where it does so.
"""

import itertools

import pytest
import torch

from tailor_engine import ops
from tailor_engine.ops import OPS, _layout
from tailor_engine.ops import _accuracy as accuracy

LEVELS = [name for name in ops.BACKENDS if name.startswith("cpu.") and not ops.unavailable(name)]
VECTOR = 64  # bytes of the widest vector and of a cache line
LENGTHS = range(2 * VECTOR // 2 + 4)  # two vectors of the smallest float, and a tail
LARGEST = 1 << 15  # values of a declared case that is worth repeating at every alignment


def placed(value, offset):
    """Return an argument whose tensors end where their memory ends, `offset` elements into it."""
    if isinstance(value, (list, tuple)):
        return type(value)(placed(item, offset) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    last = sum(
        (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    memory = torch.empty(offset + (last + 1 if value.numel() else 0), dtype=value.dtype)
    return memory.as_strided(value.shape, value.stride(), offset).copy_(value)


def check(name, level, arguments, offset=0):
    op = OPS[name]
    try:
        accuracy.check(op, op.on(level), placed(arguments, offset))
    except AssertionError as error:
        raise AssertionError(f"{_shapes(arguments)} at {offset}: {error}") from error


def _shapes(arguments):
    return [list(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]


def runnable(names):
    return [
        (n, level) for n, level in itertools.product(names, LEVELS) if not OPS[n].missing(level)
    ]


def _numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _channel_stats(length):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _numbers(9, length, dtype=dtype), None, torch.zeros(5, length)
    yield _numbers(length, 3), torch.arange(length) % 3 != 0, torch.zeros(5, 3)


def _block_influence(length):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, noise = _numbers(2, length, dtype=dtype), _numbers(length, 2, dtype=dtype).T
        yield x, x + 0.3 * noise, None, torch.zeros(4, dtype=torch.float64)


def _structured_slice(length):
    for dtype, share in itertools.product(
        (torch.uint8, torch.bfloat16, torch.float32, torch.float64), (1, 2, 3)
    ):
        kept = torch.arange(length)[torch.arange(length) % 5 % share == 0]
        weight = (100 * _numbers(3, length)).to(dtype)
        yield [weight, weight.T.contiguous()], [None, kept], [kept, None]
        yield [weight], [None], [kept.flip(0).repeat(2)]


def _gram(length):
    yield _numbers(5, length), None, torch.zeros(length, length)
    yield _numbers(length, 5), None, torch.zeros(5, 5)


def _int8_quantize(length):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _numbers(2, length, dtype=dtype), None
    yield _numbers(length, 3), None


def _int4_quantize(length):
    for symmetric in (True, False):
        yield _numbers(2, 32 * length), 32, symmetric, None


def _fake_quantize(length):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _numbers(2, length, dtype=dtype), 4, 0, False, None
    yield _numbers(2, 32 * length), 8, 32, True, None


def _int4_dequantize(length):
    data, scale, zero = OPS["int4_quantize"].reference(_numbers(2, 32 * length), 32, False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield data, scale, zero, 32, dtype


def _int8_linear(length):
    for rows, width, features in ((2, length, 5), (length, 9, 5), (2, 9, length)):
        data, scale = OPS["int8_quantize"].reference(_numbers(features, width))
        yield _numbers(rows, width), _layout.to_panels(data, 8), scale, None, "cpu", True


def _int4_linear(length):
    for rows, features in ((length, 5), (2, length)):
        data, scale, zero = OPS["int4_quantize"].reference(_numbers(features, 64), 32, False)
        scale, zero = (_layout.groups_to_panels(groups) for groups in (scale, zero))
        panels = _layout.to_panels(data, 4)
        yield _numbers(rows, 64), panels, scale, zero, _numbers(features), 32, "cpu", True


GENERATORS = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if name.removeprefix("_") in OPS and name.startswith("_")
}


@pytest.mark.parametrize(("name", "level"), runnable(GENERATORS))
def test_every_length(name, level):
    for length in LENGTHS:
        for arguments in GENERATORS[name](length):
            check(name, level, arguments)


@pytest.mark.parametrize(("name", "level"), runnable(sorted(OPS)))
def test_every_alignment(name, level):
    small = [a for a in OPS[name].cases() if _size(a) <= LARGEST]
    for offset, arguments in itertools.product(range(1, VECTOR // 4), small[:6]):
        check(name, level, arguments, offset)


def _size(value):
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


@pytest.mark.parametrize("level", LEVELS)
def test_large_slices_pass_the_caches(level):
    """From 4 MB on, rows and columns are written by other stores than small ones."""
    weight = _numbers(1030, 1100)
    kept = torch.arange(1100)[torch.arange(1100) % 33 != 0]
    for dtype, rows, columns in (
        (torch.float32, None, kept),
        (torch.float32, kept[kept < len(weight)], None),
        (torch.float64, kept[kept < len(weight)].flip(0), kept.flip(0)),
    ):
        for offset in (0, 1, 7):
            check("structured_slice", level, ([weight.to(dtype)], [rows], [columns]), offset)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_spoils_its_group_alone(level, bits, symmetric):
    x = _numbers(3, 128)
    x[0, 5], x[1, 40], x[2, 100] = float("nan"), float("inf"), -float("inf")
    results = (
        OPS["fake_quantize"].on(name)(x, bits, 32, symmetric) for name in (level, "reference")
    )
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
