"""How the C++ kernels work an int4_linear or int8_linear off: a pure function of its shape."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from tailor_engine.ops._op import _native

PATHS = ("gemv", "tiles", "unpacked")


class LinearConfig(NamedTuple):
    """What csrc/cpu/linear_tiles.h does with a product of these rows, K and N."""

    path: str
    tile_rows: int
    tile_features: int
    row_blocks: int
    chunk: int
    """Values of k that lie unpacked at a time; all of K where nothing is unpacked."""
    threads: int


@functools.cache
def config(
    level: str, bits: int, rows: int, width: int, features: int, threads: int = 1
) -> LinearConfig:
    """Return what the kernels themselves ask before they start, at one level of the CPU.

    path      when                          measured reason (Zen 5, one thread, weights from memory)
    gemv      1 or 2 rows                   one stream through memory, fetched 8 KB ahead; two
                                            panels at once are 30 % slower at AVX-512
    tiles     3 rows and more               the first rows fetch what the next panels need; at
                                            AVX-512 3 and 4 rows are one stream, too: 4 rows of
                                            4096 x 4096 take 412 us instead of 525 (int8), 288
                                            instead of 441 (int4)
    unpacked  AVX2: int4 from 8 rows, int8  what every row would do to the weight, once for all:
              from 24                       512 rows of 576 x 1536 take 3.5 ms, not 4.3 (int4), 4.1,
                                            not 4.4 (int8); fewer rows lose
    tile      12 x 32 and 6 x 32 (AVX-512)  what fits into the registers beside the weights
              6, 4 and 3 x 16 (AVX2)
    rows      blocks of at most 128         their codes stay in the second-level cache
    chunk     16 KB of unpacked codes       half of the smallest first-level cache
    threads   one a million products        ten microseconds; less loses to waking a thread
    """
    numbers = torch.empty(6, dtype=torch.int64)
    native = getattr(_native("_cpu"), level.removeprefix("cpu."))
    native.linear_config(bits, rows, width, features, threads, numbers.data_ptr())
    path, *rest = numbers.tolist()
    return LinearConfig(PATHS[path], *rest)
