"""The CUDA module where there is no GPU: it imports, plans, and refuses a launch in a sentence."""

import pytest
import torch

from tailor_engine.errors import TailorError

cuda = pytest.importorskip("tailor_engine._cuda", reason="built only where nvcc is found")


@pytest.mark.parametrize("values", [32, 96, 256 * 32, 256 * 32 + 32, 49152 * 576])
def test_a_launch_covers_all_values_and_no_more(values):
    blocks, threads = cuda.int4_dequantize_config(values)
    assert (blocks - 1) * threads * 32 < values <= blocks * threads * 32
    assert threads % 32 == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_a_launch_is_one_clear_error():
    with pytest.raises(TailorError, match=r"int4_dequantize: the GPU launch was refused: .*driver"):
        cuda.int4_dequantize(256, 256, 0, 32, 32, 256, 0, 0)
