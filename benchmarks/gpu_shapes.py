"""What is timed on a GPU: real layers' sizes, with the floor that each is held against."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tailor_engine.ops import OPS
from tailor_engine.ops._quantize import panel_shape

HALF = torch.bfloat16
GROUP = 128
# Ops that no CUDA graph can hold, and why: a replay would read memory that the host has let go.
UNRECORDED = {"structured_slice": "its launch sends a table that the host makes"}


@dataclass(frozen=True)
class Shape:
    """One timed row: its name, how its arguments are made, and what bounds it."""

    label: str
    make: Callable[[], tuple]
    arithmetic: str = "bfloat16"
    """The ceiling of its products: "bfloat16", "float32" or "int8"."""
    logits: float = 0.0
    """Of a loss: how many pass through memory between its products."""
    checked: Callable[[tuple], tuple] | None = None
    """Arguments of the check, where float64 at full size would not fit."""


def shapes(name, card) -> Iterator[Shape]:
    """Yield what is timed of an op."""
    yield from _SHAPES[name](_Maker(card)) if name in _SHAPES else ()


class _Maker:
    """Draws arguments on the card."""

    def __init__(self, card):
        self.card, self.size = card, card.size
        # As modules.place lays a weight out: in panels where the CUDA kernels read them.
        panels = not OPS["int4_linear"].missing("cuda", card.device.type)
        self.layout, self.named = ("cpu", " panels") if panels else ("canonical", "")
        self.generator = torch.Generator(card.device).manual_seed(0)

    def width(self, full):
        """Return a size that groups divide."""
        return max(GROUP, self.size(full) // GROUP * GROUP)

    def normal(self, *shape, dtype=HALF, scale=1.0):
        drawn = torch.randn(shape, generator=self.generator, device=self.card.device)
        return (scale * drawn).to(dtype)

    def integers(self, *shape, dtype):
        low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
        drawn = torch.randint(
            low, high, shape, generator=self.generator, device=self.card.device, dtype=torch.int16
        )
        return drawn.to(dtype)

    def codes(self, features, width, bits):
        """Return a weight's codes in the layout of a card."""
        shape = features, width * bits // 8
        if self.layout == "cpu":
            shape = panel_shape(features, width, bits)
        return self.integers(*shape, dtype=torch.uint8 if bits == 4 else torch.int8)

    def zeros(self, *shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=self.card.device)

    def kept(self, size, count):
        """Return some indices in order."""
        order = torch.randperm(size, generator=self.generator, device=self.card.device)
        return order[:count].sort()[0]


def _int4_linear(m):
    for tokens, width, features, quantized in (
        *((t, k, n, False) for k, n in ((4096, 11008), (8192, 8192), (8192, 28672))
          for t in (1, 4, 16)),
        *((t, 4096, 11008, False) for t in (64, 256, 1024, 2048)),
        *((t, 4096, 4096, True) for t in (1, 16, 512)),
    ):  # fmt: skip
        k, n, t = m.width(width), m.size(features), m.size(tokens)

        def make(t=t, k=k, n=n, quantized=quantized):
            scale = (m.normal(n, k // GROUP, dtype=torch.float32).abs() / 100 + 1e-3).half()
            data = m.codes(n, k, 4)
            return m.normal(t, k), data, scale, None, None, GROUP, m.layout, quantized

        kind = "int8" if quantized else "bfloat16"
        yield Shape(f"{t}x{k}x{n} {'W4A8' if quantized else 'W4A16'}{m.named}", make, kind)


def _int8_linear(m):
    for tokens, width, features, quantized in (
        *((t, 8192, 8192, q) for t in (1, 16) for q in (False, True)),
        (512, 4096, 11008, True),
        (4096, 4096, 4096, True),
    ):
        k, n, t = m.width(width), m.size(features), m.size(tokens)

        def make(t=t, k=k, n=n, quantized=quantized):
            scale = m.normal(n, dtype=torch.float32).abs() / 100 + 1e-3
            return m.normal(t, k), m.codes(n, k, 8), scale, None, m.layout, quantized

        kind = "int8" if quantized else "bfloat16"
        yield Shape(f"{t}x{k}x{n} {'W8A8' if quantized else 'W8A16'}{m.named}", make, kind)


def _linear_kl(m):
    for hidden, vocabulary in ((576, 49152), (2048, 128256), (4096, 152064)):
        for divergence in ("forward", "jensen_shannon"):
            t, d, v = m.size(4096), m.size(hidden), m.size(vocabulary)

            def make(t=t, d=d, v=v, divergence=divergence):
                heads = (m.normal(v, d, scale=d**-0.5) for _ in range(2))
                student, teacher = heads
                states = m.normal(t, d), m.normal(t, d)
                numbers = (None, None, divergence, 1.0, 0.0, 0.0, 0.0, True, True)
                return states[0], student, states[1], teacher, *numbers

            yield Shape(
                f"{t}x{d}x{v} {divergence}", make, logits=float(t * v), checked=_fewer_tokens(0, 2)
            )


def _linear_kl_topk(m):
    t, d, v, k = m.size(4096), m.size(2048), m.size(128256), m.size(64)

    def make():
        ids = torch.stack([m.kept(v, k) for _ in range(64)])
        ids = ids.repeat(-(-t // len(ids)), 1)[:t]
        listed = torch.log_softmax(m.normal(t, ids.shape[1] + 1, dtype=torch.float32), -1)
        head = m.normal(v, d, scale=d**-0.5)
        return (m.normal(t, d), head, ids, listed[:, :-1].contiguous(),
                None, None, 1.0, 0.0, 0.0, True, True)  # fmt: skip

    yield Shape(f"{t}x{d}x{v}, {k} ids", make, logits=float(t * v), checked=_fewer_tokens(0, 2, 3))


def _fewer_tokens(*positions):
    """Return how a loss is checked: on its first 256 tokens, with the whole vocabulary."""

    def fewer(arguments):
        return tuple(a[:256] if i in positions else a for i, a in enumerate(arguments))

    return fewer


def _gram(m):
    for channels, dtype in ((1024, HALF), (2048, HALF), (4096, HALF), (11008, HALF),
                            (4096, torch.float32)):  # fmt: skip
        t, d = m.size(8192), m.size(channels)
        kind = "bfloat16" if dtype == HALF else "float32"
        yield Shape(
            f"{t}x{d} {kind}",
            lambda t=t, d=d, dtype=dtype: (m.normal(t, d, dtype=dtype), None, m.zeros(d, d)),
            kind,
        )


def _channel_stats(m):
    for tokens, channels, dtype in _ACTIVATIONS:
        t, d = m.size(tokens), m.size(channels)

        def make(t=t, d=d, dtype=dtype):
            return m.normal(t, d, dtype=dtype), None, m.zeros(5, d, dtype=torch.float64)

        yield Shape(f"{t}x{d} {_short(dtype)}", make)


def _block_influence(m):
    for tokens, channels, dtype in _ACTIVATIONS:
        t, d = m.size(tokens), m.size(channels)

        def make(t=t, d=d, dtype=dtype):
            x = m.normal(t, d, dtype=dtype)
            return x, x + m.normal(t, d, dtype=dtype), None, m.zeros(4, dtype=torch.float64)

        yield Shape(f"{t}x{d} {_short(dtype)}", make)


_ACTIVATIONS = ((8192, 2048, HALF), (8192, 8192, HALF), (16384, 4096, torch.float32))


def _structured_slice(m):
    """The projections of a 1B Llama's blocks, all cut in one call."""
    hidden, inner, blocks = m.size(2048), m.size(8192), 16

    def make():
        weights, rows, columns = [], [], []
        for _ in range(blocks):
            kept = m.kept(inner, inner * 6 // 10)
            weights += [m.normal(inner, hidden), m.normal(inner, hidden), m.normal(hidden, inner)]
            rows += [kept, kept, None]
            columns += [None, None, kept]
        return weights, rows, columns

    yield Shape(f"60 % of {blocks} x 3 x {inner}x{hidden}", make)


def _int4_dequantize(m):
    for features, width in ((4096, 11008), (8192, 8192)):
        n, k = m.size(features), m.width(width)

        def make(n=n, k=k):
            scale = (m.normal(n, k // GROUP, dtype=torch.float32).abs() / 100 + 1e-3).half()
            return m.integers(n, k // 2, dtype=torch.uint8), scale, None, GROUP, HALF

        yield Shape(f"{n}x{k} bf16", make)


def _weights(*rest):
    def shapes_of(m):
        for features, width in ((4096, 11008), (8192, 8192)):
            n, k = m.size(features), m.width(width)
            yield Shape(f"{n}x{k} bf16", lambda n=n, k=k: (m.normal(n, k), *rest))

    return shapes_of


def _rms_norm(m):
    for tokens, channels in ((1, 4096), (8192, 4096)):
        t, d = m.size(tokens), m.size(channels)
        yield Shape(f"{t}x{d} bf16", lambda t=t, d=d: (m.normal(t, d), m.normal(d), 1e-5, 0.0))


def _gated_activation(m):
    for tokens in (1, 8192):
        t, d = m.size(tokens), m.size(11008)
        yield Shape(f"{t}x{d} bf16", lambda t=t, d=d: (m.normal(t, d), m.normal(t, d), "silu"))


def _rotary(m):
    for tokens in (1, 4096):
        t, heads = m.size(tokens), m.size(2048) // 64 or 1

        def make(t=t, heads=heads):
            angles = m.normal(1, t, 128, dtype=torch.float32)
            x = m.normal(1, t, heads, 128).transpose(1, 2)
            return x, angles.cos().to(HALF), angles.sin().to(HALF)

        yield Shape(f"1x{heads}x{t}x128 bf16", make)


def _short(dtype):
    return {HALF: "bf16", torch.float32: "fp32"}[dtype]


_SHAPES = {
    "block_influence": _block_influence,
    "channel_stats": _channel_stats,
    "fake_quantize": _weights(4, GROUP, True, None),
    "gated_activation": _gated_activation,
    "gram": _gram,
    "int4_dequantize": _int4_dequantize,
    "int4_linear": _int4_linear,
    "int4_quantize": _weights(GROUP, True, None),
    "int8_linear": _int8_linear,
    "int8_quantize": _weights(None),
    "linear_kl": _linear_kl,
    "linear_kl_topk": _linear_kl_topk,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "structured_slice": _structured_slice,
}
NAMES = tuple(_SHAPES)
