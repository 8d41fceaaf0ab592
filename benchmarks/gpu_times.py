"""One op's timings on a GPU: each shape checked, then in turn with its rivals, from CUDA graphs.

A kernel of ten microseconds takes longer to start than to run, so what is timed is the replay of a
graph of many calls. Each call takes the next of several copies of its arguments, together larger
than the cache, for weights and activations come from memory in real use.
"""

import contextlib
import functools
import math

import torch

from tailor_engine.ops import OPS, _accuracy

from . import gpu_checks, gpu_rivals, gpu_shapes
from .gpu_card import interleaved, once, stretch
from .peers import Peer, copied, size

SECONDS = 0.25  # of each implementation and shape
CACHES = 3  # what all copies fill, in caches
MOST_COPIES = 256
SHARE = 0.25  # of the free memory, for copies


def measure(name, card):
    """Yield rows: a time for each shape and backend, and what is missing."""
    op, missing = OPS[name], set()
    for number, shape in enumerate(gpu_shapes.shapes(name, card)):
        arguments = shape.make()
        ours, rows = {}, []
        for backend in gpu_checks.backends(op, card):
            failure = wrong(op, backend, shape, arguments)
            rows.append({"kind": "check", "op": name, "backend": backend,
                         "case": shape.label, "failure": failure})  # fmt: skip
            if not failure:
                make = functools.partial(_call, op, backend, arguments)
                ours[backend] = Peer(make, size(arguments))
        yield from rows
        if not ours:
            continue
        rivals = gpu_rivals.rivals(name, arguments, first=number == 0)
        unrecorded = dict.fromkeys(ours, gpu_shapes.UNRECORDED.get(name, ""))
        times, stopped = compare(card, ours | rivals, unrecorded)
        for rival, why in stopped.items():
            if rival in ours:
                yield {"kind": "check", "op": name, "backend": rival, "case": shape.label,
                       "failure": f"could not be timed: {why}"}  # fmt: skip
            elif (rival, why) not in missing:
                missing.add((rival, why))
                yield {"kind": "missing", "what": f"{rival} ({name})", "why": why}
        yield from _rows(op, shape, arguments, times, ours)
        del arguments, ours, rivals
        card.release()


def compile_ahead(name, card):
    """Launch once what `measure` will launch, so that it finds all kernels in Triton's cache.

    What cannot be launched is reported where it is timed.
    """
    for shape in gpu_shapes.shapes(name, card):
        arguments = shape.make()
        calls = [arguments] if shape.checked is None else [arguments, shape.checked(arguments)]
        for backend in gpu_checks.backends(OPS[name], card):
            for each in calls:
                with contextlib.suppress(Exception), torch.no_grad():
                    OPS[name].on(backend)(*each)
        del arguments, calls, each
        card.release()  # raises where an error sticks: this process can do no more


def wrong(op, backend, shape, arguments):
    """Say what is wrong with a backend at the shape that is to be timed; empty: nothing."""
    if shape.checked is not None:
        arguments = shape.checked(arguments)
    try:
        _accuracy.check(op, op.on(backend), arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def compare(card, peers, unrecorded):
    """Return ({name: (us, spread, why no graph)}, {name: why it could not be timed}).

    `unrecorded` holds, by name, why one is not to be recorded as a graph.
    """
    stretches, notes, stopped = {}, {}, {}
    for name, peer in peers.items():
        try:
            with torch.no_grad():
                calls = [peer.make() for _ in range(copies(card, peer.nbytes, len(peers)))]
                estimate, reason = once(card, calls[0]), unrecorded.get(name, "")
                replay, count, why = stretch(card, calls, estimate, reason)
            stretches[name], notes[name] = (replay, count), why
        except ImportError as error:
            stopped[name] = f"not here ({error})"
        except Exception as error:
            stopped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            card.release()
    with torch.no_grad():
        seconds = 0 if card.rehearsed else SECONDS
        found = interleaved(card, stretches, seconds) if stretches else {}
    return {name: (*times, notes[name]) for name, times in found.items()}, stopped


def copies(card, nbytes, implementations):
    """Return how many copies of its arguments an implementation turns around."""
    wanted = math.ceil(CACHES * card.cache_bytes() / max(nbytes, 1))
    fitting = int(SHARE * card.free_bytes() / implementations / max(nbytes, 1))
    return max(1, min(max(2, wanted), fitting, MOST_COPIES))


def _call(op, backend, arguments):
    return functools.partial(op.on(backend), *copied(list(arguments)))


def _rows(op, shape, arguments, times, ours):
    moved, operations = op.cost(*arguments)
    rivals = {name: us for name, (us, _, _) in times.items() if name not in ours}
    spreads = {name: spread for name, (_, spread, _) in times.items() if name not in ours}
    for backend in ours:
        if backend not in times:
            continue
        us, spread, eager = times[backend]
        yield {
            "kind": "time", "op": op.name, "backend": backend, "shape": shape.label, "us": us,
            "spread": spread, "eager": eager, "moved": moved, "operations": operations,
            "arithmetic": shape.arithmetic, "logits": shape.logits,
            "rivals": rivals, "rival_spreads": spreads,
        }  # fmt: skip
