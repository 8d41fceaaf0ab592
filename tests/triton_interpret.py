"""Run every Triton kernel through Triton's interpreter; one JSON line for each case.

The op's own cases, and some that only a kernel has: more blocks than one along each loop.

    TRITON_INTERPRET=1 python -m tests.triton_interpret
"""

import functools
import importlib
import json
import os
import time
import warnings

assert os.environ.get("TRITON_INTERPRET") == "1", "triton reads it when it is imported"

import torch  # noqa: E402

from tailor_engine.kernels import _head  # noqa: E402
from tailor_engine.ops import OPS  # noqa: E402
from tailor_engine.ops import _accuracy as accuracy  # noqa: E402

# torch.empty then gives NaN and extreme integers: an output that is not written shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_num_threads(1)
warnings.simplefilter("ignore")  # numpy's, of overflows that the kernels mask
generator = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


def longer_than_a_block():
    f64 = torch.float64
    yield "channel_stats", (normal(1100, 40), None, torch.zeros(5, 40, dtype=f64))
    yield "gram", (normal(1300, 70, dtype=torch.bfloat16), None, torch.zeros(70, 70))
    for shape in ((1030, 257), (9, 600)):
        x = normal(*shape)
        yield "block_influence", (x, x + normal(*shape), None, torch.zeros(4, dtype=f64))
    yield "int8_quantize", (normal(2, 5000), torch.tensor([0.7, 1.0]))
    for symmetric in (True, False):
        yield "fake_quantize", (normal(2, 5000), 4, 0, symmetric, torch.tensor([0.7, 1.0]))
    yield "rms_norm", (normal(2, 5000), normal(5000), 1e-6, 1.0)
    yield "gated_activation", (normal(2, 1100), normal(2, 1100), "silu")
    angles = normal(1, 70, 300)
    yield "rotary", (normal(1, 2, 70, 300), angles.cos(), angles.sin())
    data, scale = OPS["int8_quantize"].reference(normal(3, 5000))
    yield "int8_linear", (normal(2, 5000), data, scale, None, "canonical", True)
    for dtype, group, symmetric in (
        (torch.bfloat16, 32, False), (torch.float16, 64, True), (torch.float64, 32, False),
    ):  # fmt: skip
        data, scale, zero = OPS["int4_quantize"].reference(normal(70, 576), group, symmetric)
        packed = data, scale, None if symmetric else zero
        x, bias = normal(3, 576, dtype=dtype), normal(70, dtype=dtype)
        yield "int4_linear", (x, *packed, bias, group, "canonical", False)
        yield "int4_linear", (x, *packed, bias, group, "canonical", True)
    for tokens, dtype in ((2048, torch.float32), (2050, torch.bfloat16)):
        packed = OPS["int4_quantize"].reference(normal(8, 64), 32, False)
        bias = normal(8, dtype=dtype)
        x = normal(tokens, 64, dtype=dtype)
        yield "int4_linear", (x, *packed, bias, 32, "canonical", False)


# 16-bit inputs for the losses: these cases ask whether every block and chunk is there, and a single
# float32 number can be right to its last bit in plain torch by luck.
def losses(dtype=torch.bfloat16):
    labels = torch.tensor([3, -100, 4500, 0, 1])
    for kind in ("forward", "reverse", "jensen_shannon"):
        heads = (normal(5, 8), normal(5000, 8), normal(5, 6), normal(5000, 6))
        heads = (head.to(dtype) for head in heads)
        yield "linear_kl", (*heads, labels, None, kind, 1.3, 0.4, 5.0, 7.0, True, True)
    head = normal(5, 8, dtype=dtype), normal(5000, 8, dtype=dtype)
    listed = torch.arange(4150).repeat(5, 1), torch.log_softmax(normal(5, 4200), -1)[:, :4150]
    yield "linear_kl_topk", (*head, *listed, labels, None, 1.5, 0.5, 5.0, True, True)
    far = normal(70, 8)
    far[:6] *= 300  # the rest lies so far below that its exponentials vanish beside these
    head = normal(4, 8, dtype=dtype), far.to(dtype)
    listed = torch.arange(6).repeat(4, 1), torch.log_softmax(normal(4, 7), -1)[:, :6]
    yield "linear_kl_topk", (*head, *listed, None, None, 1.0, 0.0, 0.0, True, True)


def chunked_losses():
    """Three chunks of tokens, and a row that does not count but holds NaN."""
    student, teacher, counted = normal(9, 8), normal(9, 8), torch.arange(9) != 2
    student[2] = teacher[2] = float("nan")
    listed = torch.arange(7).repeat(9, 1), torch.log_softmax(normal(9, 70), -1)[:, :7]
    for dtype in (torch.bfloat16, torch.float16):
        heads = (t.to(dtype) for t in (student, normal(70, 8), teacher, normal(70, 8)))
        yield "linear_kl", (*heads, None, counted, "forward", 1.0, 0.0, 0.0, 0.0, True, True)
        head = student.to(dtype), normal(70, 8, dtype=dtype)
        yield "linear_kl_topk", (*head, *listed, None, counted, 1.0, 0.0, 0.0, True, True)


def candidates():
    """What a tuning may try, where tiles end inside the matrix, and parts outnumber groups."""
    weight, bias = normal(70, 192), normal(70)
    data, scale = OPS["int8_quantize"].reference(weight)
    data4, scale4, zero = OPS["int4_quantize"].reference(weight, 64, False)
    for tokens, quantized in ((1, True), (20, False), (70, True), (300, False)):
        x = normal(tokens, 192, dtype=torch.bfloat16)
        yield "int8_linear", (x, data, scale, bias, "canonical", quantized)
        yield "int4_linear", (x, data4, scale4, zero, None, 64, "canonical", quantized)
    yield "int8_quantize", (normal(2, 700), None)
    yield "int4_quantize", (weight, 64, False, None)
    yield "int4_dequantize", (data4, scale4, zero, 64, torch.bfloat16)
    yield "fake_quantize", (weight, 4, 64, False, None)
    yield "fake_quantize", (weight, 8, 0, True, None)


def configurations(name, arguments):
    """Yield (label, the launcher bound to one candidate): of products, each tile once."""
    module = importlib.import_module(f"tailor_engine.kernels.{name}")
    description = module.describe(*arguments)
    found = module.candidates(*description)
    assert found[0] == module.config(*description)
    tiles = {(chosen.get("block_t"), *list(chosen.values())[:2]): chosen for chosen in found}
    for chosen in tiles.values():
        yield json.dumps(chosen), functools.partial(module.launch, chosen=chosen)


def report(name, number, arguments, function=None):
    op, start = OPS[name], time.perf_counter()
    shapes = [list(a.shape) if isinstance(a, torch.Tensor) else str(a)[:60] for a in arguments]
    line = {"op": name, "case": number, "arguments": shapes, "failure": ""}
    try:
        accuracy.check(op, function or op.on("triton"), arguments)
    except AssertionError as error:
        line["failure"] = str(error) or "differs from the reference"
    print(json.dumps({**line, "seconds": time.perf_counter() - start}), flush=True)


def main():
    for name in sorted(OPS):
        if not OPS[name].missing("triton"):
            for number, arguments in enumerate(OPS[name].cases()):
                report(name, number, arguments)
    for number, (name, arguments) in enumerate([*longer_than_a_block(), *losses()]):
        report(name, f"long {number}", arguments)
    for name, arguments in candidates():
        for label, function in configurations(name, arguments):
            report(name, label, arguments, function)
    _head.BUFFER_BYTES, _head.SHORTEST = 1, 4
    for number, (name, arguments) in enumerate(chunked_losses()):
        report(name, f"chunked {number}", arguments)


if __name__ == "__main__":
    main()
