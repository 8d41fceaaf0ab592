"""Which instructions a run may use: the backend's own level, and the peers held to the same one."""

import os
import platform
import sys
from pathlib import Path

from tailor_engine.errors import UserError
from tailor_engine.ops import unavailable
from tailor_engine.ops._op import LEVELS

# Each library reads its own at start: torch's loops, MKL, oneDNN, and FBGEMM (dynamic int8).
HELD_TO_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}
SHOWN = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def best():
    """Return the highest level that this machine can run."""
    return next(level for level in reversed(LEVELS) if not unavailable(level))


def of(backend):
    """Return the level whose ceilings bound a backend: its own, or the machine's best."""
    if backend and unavailable(backend):
        raise UserError(f"backend {backend!r}: {unavailable(backend)}")
    return backend if backend in LEVELS else best()


def hold_peers(backend, arguments):
    """Start this process again with the peers held to AVX2, where a lower level is asked for.

    There is no setting for less than AVX2: at the baseline the peers are held to that.
    """
    if backend not in LEVELS or LEVELS.index(backend) >= LEVELS.index(best()):
        return
    if LEVELS.index(backend) > LEVELS.index("cpu.avx2") or held_to() == HELD_TO_AVX2:
        return
    if "avx512f" not in processor()[1]:
        return
    sys.stdout.flush()
    command = [sys.executable, "-m", "benchmarks", *arguments]
    os.execve(sys.executable, command, os.environ | HELD_TO_AVX2)


def held_to():
    """Return what the peers are held to in this process."""
    return {key: os.environ[key] for key in HELD_TO_AVX2 if key in os.environ}


def peers_have(feature):
    """Whether the peers may use an instruction set: the processor has it and nothing holds them."""
    return feature in processor()[1] and not (held_to() and feature.startswith(("avx512", "amx")))


def processor():
    """Return the processor's name and the instruction sets of SHOWN that it has."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    return name, [level for level in SHOWN if level in flags]


def cache_bytes():
    """Return the size of the largest cache of this machine; 0 where the system does not say."""
    sizes = [
        p.read_text().strip()
        for p in Path("/sys/devices/system/cpu").glob("cpu0/cache/index*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=0)
