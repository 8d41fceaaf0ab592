"""Pruning as others do it, where the prune stage has no such setting: for `benchmarks.quality`.

Each takes (model, share of the parameters to remove, calibration rows) and returns a smaller model,
cut in closed form, without repair or training. They are written for blocks of the Llama family.
"""

import copy

import torch

from tailor_engine import ops
from tailor_engine.families import drop_blocks, write_shapes
from tailor_engine.stages.prune.criteria import SUM, SUM_SQUARES
from tailor_engine.stages.prune.cut import cut_channels, cut_hidden, hidden_norms
from tailor_engine.stages.prune.hidden import collect_stream, narrowed
from tailor_engine.stages.prune.statistics import batches, collect_parts, flat, forward, hooked

STEP = 8  # hidden sizes are multiples of it
READERS = {"attention_norm": ("query", "key", "value"), "mlp_norm": ("gate", "up")}


@torch.no_grad()
def flap(model, removed, rows):
    """Drop MLP channels of small fluctuation, the mean of what goes into a bias.

    Source: FLAP (2312.11983): variance x column norm, standardised by layer, one threshold for all.
    """
    family, network = model.family, copy.deepcopy(model.network)
    found = collect_parts(family, network, _batches(model, rows), ["down"], False)["down"]
    scores, means = [], []
    for index, block in enumerate(family.blocks_of(network)):
        sums = found[index].channels / found[index].tokens
        means.append(sums[SUM])
        variance = sums[SUM_SQUARES] - sums[SUM].square()
        score = variance * family.part(block, "down").weight.double().square().sum(0)
        scores.append((score - score.mean()) / score.std())
    everything = torch.cat(scores).sort().values
    count = round(removed * model.parameters / (3 * network.config.hidden_size))
    threshold = everything[count]
    for block, score, mean in zip(family.blocks_of(network), scores, means, strict=True):
        gone = score < threshold
        bias = family.part(block, "down").weight.double()[:, gone] @ mean[gone]
        cut_channels(family, block, (~gone).nonzero()[:, 0], None)
        family.part(block, "down").bias = torch.nn.Parameter(bias.float())
    write_shapes(network)
    return model.replace(network=network, teacher=model, base=model)


@torch.no_grad()
def minitron_hidden(model, removed, rows):
    """Drop dimensions of the residual stream by their mean absolute value behind the norms.

    Source: Minitron (2407.14679), section 2.2; the norms' gains make up for the lost energy.
    """
    network = narrowed(model, 1 - removed, _batches(model, rows), STEP)
    return model.replace(network=network, teacher=model, base=model)


def dense(model, removed, rows):
    """Drop nothing: what training alone does."""
    return model.replace(teacher=model, base=model)


def last_blocks(model, removed, rows):
    """Drop the last blocks: optiPfair's default for depth."""
    network = copy.deepcopy(model.network)
    blocks = model.family.blocks_of(network)
    each = sum(p.numel() for p in blocks[0].parameters())
    drop_blocks(network, range(len(blocks) - round(removed * model.parameters / each)))
    return model.replace(network=network, teacher=model, base=model)


@torch.no_grad()
def slice_gpt(model, removed, rows):
    """Rotate the residual stream to its principal directions and drop the last ones.

    Source: SliceGPT (2401.15024), with one rotation for all blocks in place of one a half-block, so
    that stock formats hold the result. The norms' gains go into what reads them, which unties the
    head: its matrix is counted.
    """
    family, network = model.family, copy.deepcopy(model.network)
    head, embedding = family.head_of(network), family.embedding_of(network)
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    network.config.tie_word_embeddings = False
    norms = hidden_norms(family, network)
    for index, block in enumerate(family.blocks_of(network)):
        for norm, names in READERS.items():
            gain = norms[f"{family.blocks}.{index}.{getattr(family, norm)}"].weight
            for name in names:
                family.part(block, name).weight.mul_(gain)
    head.weight.mul_(norms[family.final_norm].weight)
    for norm in norms.values():
        norm.weight.fill_(1)
    found = _batches(model, rows)
    rotation = _principal_directions(family, network, norms, found)
    for block in family.blocks_of(network):
        for name in ("query", "key", "value", "gate", "up"):
            part = family.part(block, name)
            part.weight.copy_(part.weight @ rotation)
        for name in ("output", "down"):
            part = family.part(block, name)
            part.weight.copy_(rotation.T @ part.weight)
    embedding.weight.copy_(embedding.weight @ rotation)
    head.weight.copy_(head.weight @ rotation)
    share = (1 - removed) * model.parameters / sum(p.numel() for p in network.parameters())
    kept = torch.arange(int(share * network.config.hidden_size / STEP + 1e-6) * STEP)
    cut_hidden(family, network, kept, collect_stream(family, network, found).gains(kept))
    return model.replace(network=network, teacher=model, base=model)


def _principal_directions(family, network, norms, found):
    """Eigenvectors [D, D] of what the norms give, the strongest first."""
    size = network.config.hidden_size
    total = torch.zeros(size, size)
    handles = [
        norm.register_forward_hook(lambda _, __, y: ops.gram(flat(y).float(), None, total))
        for norm in norms.values()
    ]
    with hooked(handles):
        for batch in found:
            forward(family, network, batch)
    return torch.linalg.eigh(total.double()).eigenvectors.flip(1).float()


def _batches(model, rows):
    return batches(rows, 8, model.device, torch.float32)
