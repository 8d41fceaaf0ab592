"""Compile every Triton kernel ahead of time for a GPU that is not here; one JSON line each.

The kernels' own launchers run on `meta` tensors, and every launch is turned into a compilation for
the target. So what is compiled is the specialisation that a GPU would run at that shape, chosen by
the kernel's own `config`; and a launcher that reads a value back from the device fails here.

    python -m tests.triton_compile 90        # what the tests ask
    python -m tests.triton_compile 90 all    # and every configuration of the quantized products
"""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tailor_engine.ops import OPS

# Which of them a kernel uses tells what no run here can: tensor cores, exact division.
COUNTED = (
    "wgmma.mma_async", "mma.sync", "div.rn.f32", "div.full", "ld.global.v4", "st.global.v4",
    "cp.async.c",
)  # fmt: skip

HALF, F32, F64, I8, U8, I64 = (
    torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64,
)  # fmt: skip


def meta(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


def mask(tokens):
    return meta(tokens, dtype=torch.bool)


def statistics():
    yield "channel_stats", (meta(8192, 576), mask(8192), meta(5, 576, dtype=F64))
    yield "channel_stats", (meta(100, 4096, dtype=F32), None, meta(5, 4096, dtype=F32))
    yield "gram", (meta(8192, 576), mask(8192), meta(576, 576, dtype=F32))
    yield "gram", (meta(8192, 4096), None, meta(4096, 4096, dtype=F32))
    yield "gram", (meta(8192, 1536, dtype=F32), None, meta(1536, 1536, dtype=F64))
    yield "block_influence", (meta(8192, 576), meta(8192, 576), mask(8192), meta(4, dtype=F64))
    yield (
        "block_influence",
        (meta(9, 40, dtype=F32), meta(9, 40, dtype=F32), None, meta(4, dtype=F64)),
    )
    kept = meta(1024, dtype=I64)
    weights = [meta(1536, 576), meta(576, 1536), meta(1536), meta(576, 1536, dtype=F32).T]
    yield "structured_slice", (weights, [kept, None, kept, None], [None, kept, None, None])


def quantizers():
    weight = meta(1536, 8192)
    clip = meta(1536, 8192 // 64, dtype=F32)
    yield "int8_quantize", (weight, meta(1536, dtype=F32))
    yield "int8_quantize", (meta(1536, 576, dtype=F32), None)
    for symmetric in (True, False):
        yield "int4_quantize", (weight, 64, symmetric, clip)
        yield "fake_quantize", (weight, 4, 64, symmetric, clip)
    yield "fake_quantize", (weight, 8, 0, True, None)
    data, scale, zero = int4(1536, 576, 64)
    yield "int4_dequantize", (data, scale, zero, 64, HALF)
    yield "int4_dequantize", (data, scale, None, 64, F32)


def int4(features, width, group):
    groups = (features, width // group)
    return (
        meta(features, width // 2, dtype=U8),
        meta(*groups, dtype=torch.float16),
        meta(*groups, dtype=U8),
    )


def linears():
    data, scale = meta(4096, 4096, dtype=I8), meta(4096, dtype=F32)
    bias = meta(4096)
    yield "int8_linear", (meta(33, 4096), data, scale, bias, "canonical", True)
    yield "int8_linear", (meta(4096, 4096), data, scale, bias, "canonical", False)
    for dtype in (F32, F64):
        yield "int8_linear", (meta(5, 4096, dtype=dtype), data, scale, bias, "canonical", False)
    yield "int8_linear", (meta(1, 4096), meta(256, 1024, 16, 4, dtype=I8), scale, None, "cpu", True)
    for tokens, group in ((1, 128), (16, 32), (33, 64), (1024, 128)):
        packed = int4(4096, 4096, group)
        yield "int4_linear", (meta(tokens, 4096), *packed, bias, group, "canonical", True)
        yield "int4_linear", (meta(tokens, 4096), *packed, None, group, "canonical", False)
    data, scale, zero = int4(4096, 4096, 64)
    panels = meta(256, 512, 16, 4, dtype=U8)
    yield "int4_linear", (meta(1, 4096), panels, scale, zero, None, 64, "cpu", True)
    yield "int4_linear", (meta(64, 4096), panels, scale, zero, None, 64, "cpu", False)
    half = meta(64, 4096, dtype=torch.float16)
    yield "int4_linear", (half, data, scale, zero, None, 64, "canonical", False)
    yield "int4_linear", (meta(5, 4096, dtype=F32), data, scale, zero, None, 64, "canonical", False)
    yield "int4_linear", (meta(5, 4096, dtype=F64), data, scale, zero, None, 64, "canonical", False)
    yield "int4_linear", (meta(2048, 4096), data, scale, zero, None, 64, "canonical", False)


# Features by width of real layers, and tokens up to the dense product.
LAYERS = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096), (4096, 11008), (28672, 8192))
TOKENS = (1, 17, 33, 64, 128, 256, 512, 1024, 2047, 4096)


def configured(every):
    """Yield one launch for every configuration that `config` gives the quantized products.

    The tests take groups of 128 for all tiles, and other groups from `linears`; ``every`` adds
    those and the two ways of a tile's end: partial sums, or y itself.
    """
    groups, seen = (32, 64, 128) if every else (128,), set()
    for tokens, (features, width), quantized in itertools.product(TOKENS, LAYERS, (True, False)):
        x, scale = meta(tokens, width), meta(features, dtype=F32)
        plain = x, meta(features, width, dtype=I8), scale, None, "canonical", quantized
        calls = [("int8_linear", plain)]
        for group in groups:
            if width % group == 0:
                packed = *int4(features, width, group)[:2], None, None
                calls.append(("int4_linear", (x, *packed, group, "canonical", quantized)))
        for name, arguments in calls:
            module = importlib.import_module(f"tailor_engine.kernels.{name}")
            chosen = dict(module.config(*module.describe(*arguments)))
            split = chosen.pop("parts") > 1
            key = name, quantized, arguments[-3], every and split, *chosen.values()
            if not chosen.get("dense") and key not in seen:
                seen.add(key)
                yield name, arguments


def losses():
    heads = meta(1024, 576), meta(49152, 576), meta(1024, 2048), meta(49152, 2048)
    labels, gradients = meta(1024, dtype=I64), (True, True)
    for kind in ("forward", "reverse", "jensen_shannon"):
        yield "linear_kl", (*heads, labels, mask(1024), kind, 2.0, 0.5, 30.0, 0.0, *gradients)
    yield "linear_kl", (*heads, None, mask(1024), "forward", 1.0, 0.0, 0.0, 0.0, *gradients)
    yield "linear_kl", (*heads, labels, None, "forward", 1.0, 1.0, 0.0, 0.0, False, False)
    for k in (64, 512):
        teacher = meta(1024, k, dtype=I64), meta(1024, k, dtype=F32)
        rest = (labels, mask(1024), 2.0, 0.5, 30.0, *gradients)
        yield "linear_kl_topk", (*heads[:2], *teacher, *rest)


def neighbours():
    """What stands between the products of a block."""
    yield "rms_norm", (meta(512, 576), meta(576), 1e-5, 0.0)
    yield "rms_norm", (meta(2, 9, 8192, dtype=F32), meta(8192, dtype=F32), 1e-6, 1.0)
    for activation in ("silu", "gelu_tanh"):
        both = meta(512, 3072)
        yield "gated_activation", (both[:, :1536], both[:, 1536:], activation)
    angles = meta(1, 512, 64)
    yield "rotary", (meta(2, 512, 9, 64).transpose(1, 2), angles, angles)
    angles = meta(2, 1, 80, dtype=F32)
    yield "rotary", (meta(2, 8, 1, 80, dtype=F32), angles, angles)


def launches(every):
    yield from configured(every)
    yield from statistics()
    yield from quantizers()
    yield from linears()
    yield from losses()
    yield from neighbours()


class Target:
    """The only part of a GPU driver that a compilation asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(compiled):
    """Read registers, stack (spills) and shared memory from the machine code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": fields["REG"],
        "spilled_bytes": fields["STACK"] + fields["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "instructions": {name: compiled.asm["ptx"].count(name) for name in COUNTED},
    }


def main(capability, every):
    driver.set_active(Target(capability))
    compile_only, current = JITFunction.run, {}

    def run(self, *args, grid, warmup, **options):
        compiled = compile_only(self, *args, grid=grid, warmup=True, **options)
        chosen = {k: v for k, v in options.items() if isinstance(v, (int, bool))}
        kernel = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        current["exact_float"] = options.get("OPERAND") in (tl.float32, tl.float64)
        line = {"sm": capability, **current, "kernel": kernel, "grid": list(grid), **chosen}
        print(json.dumps({**line, **resources(compiled)}), flush=True)
        return compiled

    JITFunction.run = run
    for name, arguments in launches(every):
        shapes = [list(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
        current.update(op=name, shapes=shapes[:2])
        OPS[name].implementation("triton")(*arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["all"])
