"""Gradient steps block by block, on the dense model's stream: for `benchmarks.quality`."""

import copy
import math

import torch
import torch.nn.functional as F

from tailor_engine.stages.prune.lockstep import lane_of
from tailor_engine.stages.prune.statistics import batches, flat

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
    lanes = [lane_of(model.family, network, batch, False) for batch in found]
    blocks = model.family.blocks_of(network)
    whole = model.family.blocks_of(model.teacher.network)
    for index, (block, teacher) in enumerate(zip(blocks, whole, strict=True)):
        with torch.no_grad():
            for lane in lanes:
                lane.dense = _run(teacher, index, lane, lane.dense)
        if model.family.has(block, "mlp"):
            weights = [model.family.part(block, name).weight for name in TRAINED]
            _train(block, index, weights, lanes, steps)
        with torch.no_grad():
            for lane in lanes:
                lane.pruned = _run(block, index, lane, lane.pruned)
    return model.replace(network=network)


def _train(block, index, weights, lanes, steps):
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        lane = lanes[step % len(lanes)]
        given = flat(_run(block, index, lane, lane.pruned))
        loss = F.mse_loss(given[lane.batch.valid], flat(lane.dense)[lane.batch.valid])
        gradients = torch.autograd.grad(loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
    for weight in weights:
        weight.grad = None


def _run(block, index, lane, x):
    args, kwargs = lane.arguments[index]
    result = block(x, *args, **kwargs)
    return result[0] if isinstance(result, tuple) else result
