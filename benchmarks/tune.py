"""`tailor bench --tune`: measure each Triton kernel's candidates on this card, and keep the best.

A kernel chooses by a pure `config` of its shape; `candidates`, with the same arguments, lists what
else could be chosen. What is measured here is used only under TAILOR_TUNED=1.
"""

import functools
import importlib.util

import torch

from tailor_engine.errors import UserError
from tailor_engine.io import tuned
from tailor_engine.ops import OPS, _accuracy
from tailor_engine.ops._tuned import key

from . import gpu_shapes, gpu_times, gpu_worker
from .gpu_card import Card
from .peers import Peer, copied, size

WORTH = 1.03  # a candidate must be so much faster than what `config` reasons


def run(names, card=None):
    """Yield a line a shape; write what was faster into the card's file at the end."""
    card = card or Card()
    if importlib.util.find_spec("tailor_engine.kernels") is None:  # a tree that is not installed
        gpu_worker.own_kernels()
    if not card.rehearsed and not torch.cuda.is_available():
        raise UserError("--tune needs a CUDA GPU, and there is none here")
    table = {}
    for name in names or sorted(gpu_shapes.NAMES):
        module = importlib.import_module(f"tailor_engine.kernels.{name}")
        if not hasattr(module, "candidates"):
            yield f"{name}: its kernel lists no candidates"
            continue
        for shape in gpu_shapes.shapes(name, card):
            arguments = shape.make()
            asked, times = measure(OPS[name], module, shape, arguments, card)
            if not times:
                yield f"{name} {shape.label}: no choice"
                continue
            reasoned, us = times.pop(0)
            best, least = min(times, key=lambda pair: pair[1], default=(reasoned, us))
            if us > WORTH * least:
                table.setdefault(name, {})[key(asked)] = best
            yield f"{name} {shape.label}: {us:.1f} us as reasoned, {least:.1f} us by {best}"
            card.release()
    yield f"kept: {tuned.keep(card.describe()['name'], table)}"


def measure(op, module, shape, arguments, card):
    """Return (config's arguments, [(configuration, us)]); the first is what config reasons.

    A candidate that is wrong, or that the card refuses, is left out.
    """
    asked = arguments_of_config(module, arguments)
    if asked is None:
        return None, []
    reasoned = module.config(*asked)
    listed = [reasoned, *(each for each in module.candidates(*asked) if each != reasoned)]
    peers, checked = {}, shape.checked(arguments) if shape.checked else arguments
    for number, chosen in enumerate(listed):
        launch = functools.partial(module.launch, chosen=chosen)
        try:
            _accuracy.check(op, launch, checked)
        except Exception:
            card.release()
            continue
        peers[number] = Peer(lambda f=launch: functools.partial(f, *copied(arguments)),
                             size(arguments))  # fmt: skip
    if 0 not in peers:
        return asked, []
    unrecorded = dict.fromkeys(peers, gpu_shapes.UNRECORDED.get(op.name, ""))
    times, _ = gpu_times.compare(card, peers, unrecorded)
    return asked, [(listed[number], times[number][0]) for number in peers if number in times]


def arguments_of_config(module, arguments):
    """Return what a launcher asks its config about; None where it asks nothing."""
    seen, config = [], module.config

    def watched(*asked):
        seen.append(asked)
        return config(*asked)

    module.config = watched
    try:
        module.launch(*copied(list(arguments)))
    finally:
        module.config = config
    return seen[0] if seen else None
