"""How the linears are worked off: config() on a grid of shapes, and that every path is run."""

import itertools

import pytest
import torch

from tailor_engine import ops
from tailor_engine.ops import OPS
from tailor_engine.ops._linear_config import PATHS, config
from tailor_engine.ops._memory import use_large_pages

LEVELS = [name for name in ops.BACKENDS if name.startswith("cpu.") and not ops.unavailable(name)]
ROWS, WIDTHS, FEATURES = (1, 2, 3, 4, 7, 16, 64, 129, 512), (32, 576, 4096), (1, 192, 11008)
kinds = pytest.mark.parametrize(("level", "bits"), itertools.product(LEVELS, (4, 8)))


@kinds
def test_every_shape_has_a_sound_config(level, bits):
    for rows, width, features in itertools.product(ROWS, WIDTHS, FEATURES):
        found = config(level, bits, rows, width, features, 2)
        case = f"{rows}x{width}x{features}: {found}"
        assert (found.path == "gemv") == (rows <= 2), case
        assert 1 <= found.tile_rows <= 12, case
        assert found.tile_features % 16 == 0, case
        # The codes of a block of rows stay in the second-level cache.
        assert found.row_blocks == -(-rows // 128), case
        # A chunk holds whole groups, and its unpacked codes half a first-level cache of 32 KB.
        assert found.chunk == width or found.chunk % 128 == 0, case
        if found.path == "unpacked":
            assert found.chunk * found.tile_features <= 1 << 14, case
        else:
            assert found.chunk == width, case
        small = rows * width * features < 1_000_000
        assert found.threads == (1 if small else 2), case
        assert config(level, bits, rows, width, features, 1) == found._replace(threads=1), case


@kinds
def test_the_declared_cases_run_every_path(level, bits):
    op = OPS[f"int{bits}_linear"]
    reachable = {
        config(level, bits, rows, width, 64).path for rows, width in itertools.product(ROWS, WIDTHS)
    }
    declared = {
        config(level, bits, x.numel() // x.shape[-1], x.shape[-1], 64).path
        for x, *_, quantize_activations in op.cases()
        if x.numel() and quantize_activations
    }
    assert declared == reachable <= set(PATHS)


@pytest.mark.skipif(len(LEVELS) < 2, reason="this machine runs the baseline only")
def test_many_rows_unpack_where_it_pays():
    assert config("cpu.baseline", 4, 512, 576, 1536).path == "tiles"
    for bits in (4, 8):
        assert config("cpu.avx2", bits, 512, 576, 1536).path == "unpacked"


def test_large_pages_change_no_value():
    weights = [torch.arange(n, dtype=torch.int32) for n in (0, 5, 300_000, 2_000_000)]
    expected = [weight.clone() for weight in weights]
    use_large_pages([*weights, None])
    assert all(map(torch.equal, weights, expected))
