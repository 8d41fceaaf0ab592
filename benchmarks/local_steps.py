"""Gradient steps block by block, on the dense model's stream: for `benchmarks.quality`."""

import copy
import math

import torch
import torch.nn.functional as F

from tailor_engine.stages.prune.statistics import batches, forward, hooked

BATCH = 4  # rows a step
RATE = 1e-4
TRAINED = ("gate", "up", "down")


def local_steps(model, rows, steps):
    """Return the model after `steps` of AdamW a block; its teacher has the same blocks, whole.

    From the first block to the last: feed-forward weights learn to give, of the smaller model's
    stream, what the dense block gives of its own, so that upstream error is corrected as well.
    """
    network = copy.deepcopy(model.network)
    found = batches(rows, BATCH, model.device, torch.float32)
    small, around = _entering(model.family, network, found)
    dense, _ = _entering(model.family, model.teacher.network, found)
    blocks = model.family.blocks_of(network)
    whole = model.family.blocks_of(model.teacher.network)
    for block, teacher in zip(blocks, whole, strict=True):
        dense = _through(teacher, dense, around)
        if model.family.has(block, "mlp"):
            weights = [model.family.part(block, name).weight for name in TRAINED]
            _train(block, weights, (small, dense, around), [batch.valid for batch in found], steps)
        small = _through(block, small, around)
    return model.replace(network=network)


def _train(block, weights, seen, valid, steps):
    inputs, targets, around = seen
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        i = step % len(inputs)
        given = _only(block(inputs[i], **around[i])).flatten(0, 1)[valid[i]]
        loss = F.mse_loss(given, targets[i].flatten(0, 1)[valid[i]])
        gradients = torch.autograd.grad(loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
    for weight in weights:
        weight.grad = None


@torch.no_grad()
def _entering(family, network, found):
    """What enters the first block, a batch, and the keywords it is called with."""
    streams, around = [], []

    def take(_, arguments, keywords):
        streams.append(arguments[0])
        around.append(keywords)

    first = family.blocks_of(network)[0]
    with hooked([first.register_forward_pre_hook(take, with_kwargs=True)]):
        for batch in found:
            forward(family, network, batch)
    return streams, around


@torch.no_grad()
def _through(block, streams, around):
    return [_only(block(x, **keywords)) for x, keywords in zip(streams, around, strict=True)]


def _only(result):
    return result[0] if isinstance(result, tuple) else result
