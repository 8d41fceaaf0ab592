"""`tailor bench prefill`: a prompt of 512 tokens, ours beside whole-network peers."""

import torch

import tailor_engine

from . import engines

TOKENS = 512


def run(quick=False, threads=None, json=None):
    """Yield one line a network, after all have been timed in turn; append them to a file."""
    if threads:
        torch.set_num_threads(threads)
    model = tailor_engine.load(engines.SOURCE)
    ids = engines.prompt(model, TOKENS)
    with engines.temporary() as folder:
        made, missing = engines.engines(model, folder)
        yield from missing
        samples = {name: [] for name in made}
        for number in range(3 if quick else 10):
            for name, engine in made.items():
                took = engines.milliseconds(engine.prefill, ids)
                if number:  # the first one allocates
                    samples[name].append(took)
    rows = list(engines.rows_of(samples, "prefill", str(TOKENS), TOKENS))
    yield from map(engines.line, rows)
    engines.record(rows, "prefill", json)
