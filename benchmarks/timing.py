"""Time implementations side by side, and measure what this machine could do at most."""

import os
import platform
import statistics
import time
from pathlib import Path

import torch

LEVEL_SETTINGS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def interleaved(functions, seconds=0.5, least=5, most=200):
    """Time several functions in turn, so that a busy moment of the machine hits all of them.

    Returns {name: (median microseconds, spread)}; spread: interquartile range over median.
    """
    for function in functions.values():
        function()  # first touch, caches, dispatch
    samples = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while True:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(1e6 * (time.perf_counter() - start))
        count = len(next(iter(samples.values())))
        if count >= most or (count >= least and time.perf_counter() > end):
            break
    return {name: summary(times) for name, times in samples.items()}


def summary(times):
    """Return the median and the interquartile range relative to it."""
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def ceilings():
    """Measure the limits: read bandwidth in GB/s and float32 product rate in GFLOP/s.

    The product rate is that of a large torch product: what a good library reaches here.
    """
    buffer = torch.ones(64 << 20)  # 256 MB: larger than any last-level cache
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    read, _ = interleaved({"read": buffer.sum}, 1.0)["read"]
    product, _ = interleaved({"product": lambda: a @ b}, 1.0)["product"]
    return {
        "read_gbps": buffer.nbytes / read / 1e3,
        "float32_gflops": 2 * 1024**3 / product / 1e3,
    }


def machine():
    """Describe this machine: processor, its levels, threads, versions."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    levels = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "processor": name,
        "levels": [level for level in levels if level in flags],
        # What the peers were held to, where a lower level is timed on a better machine.
        "held_to": {key: os.environ[key] for key in LEVEL_SETTINGS if key in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
