"""`tailor bench decode`: tokens per second of one request, ours beside whole-network peers.

Greedy, after a prompt of 128 tokens; each network decodes its tokens in one go, all take turns.
"""

import torch

import tailor_engine

from . import engines

CONTEXT = 128


def run(quick=False, threads=None, json=None):
    """Yield one line a network, after all have been timed in turn; append them to a file."""
    if threads:
        torch.set_num_threads(threads)
    tokens, rounds = (16, 1) if quick else (64, 3)
    model = tailor_engine.load(engines.SOURCE)
    ids = engines.prompt(model, CONTEXT)
    with engines.temporary() as folder:
        made, missing = engines.engines(model, folder)
        yield from missing
        samples = {name: [] for name in made}
        for _ in range(rounds):
            for name, engine in made.items():
                engine.prefill(ids)
                engine.step()  # its first token is colder than the others
                samples[name] += [engines.milliseconds(engine.step) for _ in range(tokens)]
    rows = list(engines.rows_of(samples, "decode", f"{CONTEXT} + {tokens}", 1))
    yield from map(engines.line, rows)
    engines.record(rows, "decode", json)
