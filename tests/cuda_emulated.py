"""The CUDA kernels' own source on the host: built with sanitizers, run on the ops' cases and more.

    python -m tests.cuda_emulated build     # returns the command line's environment as JSON
    python -m tests.cuda_emulated run       # in that environment; one JSON line a check

tests/cuda_emulate.h says how a GPU's threads run here. The functions under test are the ops' own
`cuda` backends: the address sanitizer guards every tensor, fresh ones start as NaN, and so does
shared memory.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/emulated"
MODULE = FOLDER / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
HEADERS = ROOT / "tests/cuda_emulate.h", *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/cuda/*.cuh")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-mf16c", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
COMPILER = os.environ.get("CXX", "g++")


def build():
    """Compile what has changed, two files at a time, and link the module."""
    import pybind11

    FOLDER.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{p}" for p in (ROOT / "tests", ROOT / "csrc/cuda", pybind11.get_include())]
    includes.append(f"-I{sysconfig.get_path('include')}")
    newest = max(path.stat().st_mtime for path in HEADERS)
    sources = sorted({*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")})
    objects = {source: FOLDER / f"{source.name}.o" for source in sources}
    command = [COMPILER, "-x", "c++", *FLAGS, *CHECKS, "-DTAILOR_EMULATE", *includes]
    stale = [
        [*command, "-c", source, "-o", target]
        for source, target in objects.items()
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime)
    ]
    for commands in itertools.zip_longest(stale[::2], stale[1::2]):
        running = [subprocess.Popen(command) for command in commands if command]
        if any(process.wait() for process in running):
            raise SystemExit("the kernels do not compile for the host")
    if stale or not MODULE.exists():
        subprocess.run([COMPILER, "-shared", *CHECKS, *objects.values(), "-o", MODULE], check=True)


def environment():
    """Return what the sanitizers need around Python: their runtimes first, fresh memory as NaN."""
    names = ("libasan.so", "libstdc++.so")  # the latter so that libasan can see exceptions
    paths = [
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in names
    ]
    options = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"
    return {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": options}


def load():
    spec = importlib.util.spec_from_file_location("_cuda", MODULE)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native


class Counting:
    """The emulated module; counts the launches, so that a check cannot pass by another path."""

    def __init__(self, native):
        self.native, self.launches = native, 0

    def __getattr__(self, name):
        from tailor_engine.ops import OPS

        found = getattr(self.native, name)
        if name not in OPS and name != "int4_dequantize_panels":
            return found

        def launch(*arguments):
            self.launches += 1
            return found(*arguments)

        return launch


def sweep(torch):
    """(op, arguments, card or None) beyond the ops' cases: each operand, group, kind of tail."""
    from tailor_engine.ops.packed import PackedWeight

    generator = torch.Generator().manual_seed(1)
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    shapes = [
        # tokens, features, width, dtype, quantized
        (1, 16, 128, bf16, False),
        (1, 48, 1152, bf16, False),
        (2, 33, 384, f16, False),
        (8, 32, 256, bf16, False),
        (9, 70, 640, f16, False),
        (16, 130, 384, bf16, False),
        (5, 100, 896, bf16, False),
        (1, 40, 2176, f32, True),
        (3, 65, 384, bf16, True),
        (16, 257, 256, f16, True),
        (11, 31, 1408, f32, True),
    ]
    special = [
        ((16, 128, 4096, f16, False), 128, "ampere"),  # twice round the ring of four chunks
        ((16, 40, 4096, bf16, False), 64, "hopper"),  # clusters of four
        ((3, 20, 8192, f32, True), 32, "hopper"),  # and of eight
    ]
    usual = ((shape, group, None) for shape in shapes for group in (32, 64, 128))
    for (tokens, features, width, dtype, quantized), group, card in (*usual, *special):
        weight = torch.randn(features, width, generator=generator)
        packed = PackedWeight.quantize(weight, 4, group, group == 64).to_layout("cpu")
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        bias = torch.randn(features, generator=generator).to(dtype) if tokens % 2 else None
        parts = packed.data, packed.scale, packed.zero
        yield "int4_linear", (x, *parts, bias, group, "cpu", quantized), card
    for features, width, group, dtype in (
        (33, 64, 32, bf16),
        (16, 384, 128, f32),
        (7, 192, 64, f16),
    ):
        packed = PackedWeight.quantize(torch.randn(features, width), 4, group, group == 64)
        packed, x = packed.to_layout("cpu"), torch.eye(2048, width, dtype=dtype)
        parts = packed.data, packed.scale, packed.zero
        yield "int4_linear", (x, *parts, None, group, "cpu", False), None
    for tokens, features, width, dtype in (
        (1, 48, 2080, bf16), (2, 16, 8, f32), (8, 33, 31, f16), (16, 200, 520, bf16),
        (9, 1, 1, f32), (16, 64, 4099, bf16),
    ):  # fmt: skip
        weight = torch.randn(features, width, generator=generator)
        packed = PackedWeight.quantize(weight, 8).to_layout("cpu")
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        bias = torch.randn(features, generator=generator) if tokens > 1 else None
        yield "int8_linear", (x, packed.data, packed.scale, bias, "cpu", True), None


def divide_up(a, b):
    return -(-a // b)


def wrong_configs(native):
    """Yield what is wrong with a launch, over shapes of real models and of none."""
    widths = (1, 32, 576, 1536, 4096, 8192, 11008, 28672)
    features = (1, 16, 33, 576, 1024, 4096, 8192, 11008, 49152, 151936)
    shapes = itertools.product((1, 2, 7, 8, 9, 16), features, widths, ((4, 1), (4, 2), (8, 1)))
    for (tokens, n, k, (bits, element)), card in itertools.product(shapes, CARDS.values()):
        c = native.small_batch_config(tokens, n, k, bits, element, native.Machine(*card))
        step = 512 // bits
        share, pairs = divide_up(divide_up(k, step), c["splits"]), divide_up(n, 32)
        wave = (3 if tokens <= 8 else 2) * card[0]
        held = divide_up(min(c["blocks"], wave), card[0])  # of a multiprocessor
        token_bytes = min(4 * c["chunk_steps"], share) * step * tokens * element
        rules = {
            "eight tokens a tile": c["tiles"] == divide_up(tokens, 8),
            "all warps at work": c["warps_n"] * c["warps_k"] * 32 == c["threads"],
            "the cluster is one": 1 <= c["splits"] <= card[1] and c["blocks"] % c["splits"] == 0,
            "all features": c["blocks"] // c["splits"] * c["warps_n"] >= pairs
            > (c["blocks"] // c["splits"] - 1) * c["warps_n"],
            "no block without k": c["splits"] == 1 or share * (c["splits"] - 1) * step < k,
            "one wave where K is cut": c["splits"] == 1 or c["blocks"] <= wave,
            "warps take turns": c["chunk_steps"] % c["warps_k"] == 0 < c["chunk_steps"],
            "tokens fit": c["token_bytes"] == token_bytes,
            "held at once": (1 if c["warps_n"] == 1 else held) * (c["shared_bytes"] + 1024)
            <= (227 if card[1] > 1 else 163) << 10,
        }  # fmt: skip
        for rule, holds in rules.items():
            if not holds:
                yield f"{rule}: {tokens} x {k} x {n}, {bits} bits, {card}: {c}"


CARDS = {"hopper": (132, 8), "ampere": (108, 1), "small": (2, 4)}


def main():
    import torch

    from tailor_engine.ops import OPS, _accuracy
    from tailor_engine.ops import _small_batch as small_batch

    native = Counting(load())
    wrong = list(wrong_configs(native))
    print(json.dumps({"op": "config", "failure": "; ".join(wrong[:3])}), flush=True)
    card, order = ["hopper"], [0]
    small_batch.machine = lambda native, device: native.Machine(*CARDS[card[0]])
    small_batch.queue = lambda device: contextlib.nullcontext(order[0])
    sys.modules["tailor_engine.ops.int4_dequantize"].queue = small_batch.queue
    declared = [
        (name, arguments, None)
        for name, op in OPS.items()
        if op.cuda is not None
        for arguments in op.cases()
    ]
    for number, (name, arguments, given) in enumerate([*declared, *sweep(torch)]):
        # In turn three cards, for which K is cut differently; on each both orders of the threads.
        card[0] = given or [*CARDS][number % 3]
        shapes = [list(a.shape) if isinstance(a, torch.Tensor) else str(a) for a in arguments]
        native.launches, failure, results = 0, "", []

        def function(*own, op=OPS[name], results=results):
            results.append(op.cuda(native, *own))
            return results[-1]

        try:
            for order[0] in (0, 1):
                _accuracy.check(OPS[name], function, arguments)
            assert torch.equal(*results), "another order of the threads gives other bits"
        except AssertionError as error:
            failure = str(error)
        line = {"op": name, "arguments": shapes, "card": card[0], "failure": failure}
        print(json.dumps({**line, "launches": native.launches}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build()
        print(json.dumps(environment()))
    else:
        main()
