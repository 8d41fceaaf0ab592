"""Run what `candidates` offers of each kernel through Triton's interpreter; one JSON line each.

TRITON_INTERPRET=1 python -m tests.triton_candidates
"""

import functools
import json
import os

assert os.environ.get("TRITON_INTERPRET") == "1", "triton reads it when it is imported"

import torch  # noqa: E402

from tailor_engine.kernels import (  # noqa: E402
    block_influence,
    channel_stats,
    gram,
    linear_kl,
    linear_kl_topk,
    structured_slice,
)
from tailor_engine.ops import OPS  # noqa: E402
from tailor_engine.ops import _accuracy as accuracy  # noqa: E402

torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=generator).to(dtype)


def launches():
    """Yield kernel, arguments and how many of its candidates to try."""
    head = normal(3, 8), normal(17001, 8)  # an odd vocabulary, blocks of every size and a rest
    labels = torch.tensor([5, -100, 17000])
    numbers = (labels, None, "jensen_shannon", 1.0, 0.5, 0.0, 0.0, True, True)
    yield linear_kl, (*head, *head, *numbers), 3
    listed = torch.tensor([[3, 17000]] * 3), torch.tensor([[-1.0, -2.0]] * 3)
    yield linear_kl_topk, (*head, *listed, labels, None, 2.0, 0.5, 0.0, True, True), 3

    mask = torch.arange(1100) % 3 != 0
    for tokens, channels, kept, tried in ((1100, 300, mask, 3), (66, 1030, None, 1)):
        out = torch.zeros(channels, channels, dtype=torch.float64)
        yield gram, (normal(tokens, channels), kept, out), tried
    x = normal(600, 150)
    x[3, 7] = float("nan")  # gives NaN in its channel, and in its row
    yield channel_stats, (x, None, torch.zeros(5, 150, dtype=torch.float64)), 3
    totals = torch.zeros(4, dtype=torch.float64)
    yield block_influence, (x, x + normal(600, 150), None, totals), 3

    kept = torch.tensor([5, 0, 0, 3])
    weights = [normal(6, 3000), normal(40, 9).T, normal(7, 6).char(), normal(6, dtype=torch.half)]
    rows, columns = [kept, None, None, kept], [None, kept, kept, None]
    yield structured_slice, (weights, rows, columns), 3


def wrong_index():
    """A wrong index is marked, and what is read for it is still the matrix."""
    weight = torch.arange(12.0).reshape(3, 4)
    failure = "a wrong index went unnoticed"
    try:
        structured_slice.launch([weight], [torch.tensor([7, -1])], [None])
    except RuntimeError as error:
        failure = "" if "index is out of range" in str(error) else str(error)
    return {"kernel": "structured_slice", "chosen": "wrong index", "failure": failure}


def main():
    print(json.dumps(wrong_index()), flush=True)
    for kernel, arguments, tried in launches():
        name = kernel.__name__.rpartition(".")[2]
        for chosen in kernel.candidates(*kernel.describe(*arguments))[:tried]:
            line = {"kernel": name, "chosen": chosen, "failure": ""}
            try:
                launch = functools.partial(kernel.launch, chosen=chosen)
                accuracy.check(OPS[name], launch, arguments)
            except AssertionError as error:
                line["failure"] = str(error) or "differs from the reference"
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
