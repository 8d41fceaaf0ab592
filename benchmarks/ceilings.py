"""What this machine can do at most at one level: native probes, before anything is timed."""

import functools
import importlib
import mmap
import os
import time
from dataclasses import dataclass

import torch

from .levels import cache_bytes, peers_have

# How far ahead of a read to prefetch, in bytes: which one pays differs by machine and page size.
AHEAD = (0, 1024, 2048)
PROBE_SECONDS = 0.3
UNITS = {"read": "GB/s", "copy": "GB/s", "int8": "GMAC/s", "int4": "GMAC/s"}  # others: GFLOP/s
MEANING = {
    "read": "read from memory",
    "copy": "copy, read + written",
    "float32": "fp32 FMA",
    "int8": "int8 products",
    "int4": "int8 x int4 products",
    "bfloat16": "bf16 products",
    "torch float32": "torch's fp32 product",
    "torch bfloat16": "torch's bf16 product",
}


@dataclass(frozen=True)
class Ceilings:
    """The limits of one level, by number of threads: {threads: {what: rate}}.

    Rates: GB/s for read and copy; operations of 1e9/s for the arithmetic, two to a product.
    """

    level: str
    rates: dict[int, dict[str, float]]

    def limit(self, op, dtype, moved, operations, threads):
        """Return (name, seconds) of what bounds a call from below: memory or arithmetic."""
        rates = self.rates[threads]
        memory = moved / 1e9 / rates["copy" if op.arithmetic == "none" else "read"]
        kind = op.arithmetic
        if kind == "float":
            kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
        if not operations or kind == "none":
            return "memory", memory
        arithmetic = operations / 1e9 / rates[kind]
        return ("memory", memory) if memory >= arithmetic else (kind, arithmetic)


def measure(level, threads, quick=False):
    """Return the Ceilings of a level with one thread, with `threads` and with all there are."""
    native = getattr(importlib.import_module("tailor_engine._cpu"), level.removeprefix("cpu."))
    seconds = PROBE_SECONDS / 3 if quick else PROBE_SECONDS
    size = max(96 << 20, 2 * cache_bytes()) if quick else max(256 << 20, 4 * cache_bytes())
    buffers = [_pages(size, huge) for huge in (False, True)]
    before = torch.get_num_threads()
    try:
        rates, least = {}, {}
        for count in sorted({1, threads, available()}):
            found = _rates(native, buffers, count, seconds)
            # What fewer threads reach, more can: memory is the same for one and for all.
            least = {name: max(rate, least.get(name, 0.0)) for name, rate in found.items()}
            rates[count] = least
    finally:
        torch.set_num_threads(before)
    return Ceilings(level, rates)


def available():
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _rates(native, buffers, threads, seconds):
    """The best of every variant: a ceiling that a kernel passes would be none."""
    size = len(buffers[0])
    addresses = [torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() for buffer in buffers]
    half = size // 2
    reads = [
        functools.partial(native.probe_read, address, size, streams, ahead, threads)
        for address in addresses for streams in (1, 4) for ahead in AHEAD
    ]  # fmt: skip
    copies = [
        functools.partial(native.probe_copy, address, address + half, half, ahead, threads)
        for address in addresses for ahead in (-1, *AHEAD)
    ]  # fmt: skip
    torch.set_num_threads(threads)
    found = {
        "read": max(_rate(probe, seconds / len(reads)) for probe in reads),
        "copy": max(_rate(probe, seconds / len(copies)) for probe in copies),
        "float32": _peak(lambda rounds: native.probe_float32(rounds, threads), seconds),
        "int8": _peak(lambda rounds: native.probe_integer(rounds, 1, threads), seconds),
        "int4": _peak(lambda rounds: native.probe_integer(rounds, 8, threads), seconds),
        "torch float32": _product(torch.float32, seconds),
    }
    if peers_have("avx512f"):  # without it, it takes seconds
        found["torch bfloat16"] = _product(torch.bfloat16, seconds)
    # What torch's own products reach is counted too: it may have instructions that no level uses.
    probed = _peak(lambda rounds: native.probe_bfloat16(rounds, threads), seconds)
    found["bfloat16"] = max(probed, found.get("torch bfloat16", 0.0), found["float32"])
    return found


def _rate(probe, seconds):
    """Return the best rate of a probe in 1e9/s: what disturbs it can only make it slower."""
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        done = probe()
        stop = time.perf_counter()
        best = max(best, done / (stop - start) / 1e9)
        if stop > end:
            return best


def _peak(probe, seconds):
    """Return the best rate of an arithmetic probe, in calls of about a millisecond."""
    rounds = 1000
    while rounds < 1 << 24:
        start = time.perf_counter()
        if probe(rounds) == 0:
            return 0.0
        if time.perf_counter() - start > 1e-3:
            break
        rounds *= 4
    return _rate(lambda: probe(rounds), seconds)


def _product(dtype, seconds):
    a, b = torch.ones(2, 768, 768, dtype=dtype)
    return _rate(lambda: (a @ b) is not None and 2.0 * 768**3, seconds)


def _pages(size, huge):
    """Return a touched buffer, on 2 MB pages where the system gives them."""
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared: never huge
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(buffer, dtype=torch.uint8).fill_(0)
    return buffer
