"""Tiny models in every shape that a stage can leave behind."""

import copy

import torch

from tailor_engine import families
from tailor_engine.fused import fuse
from tailor_engine.modules import QuantizedEmbedding, QuantizedLinear
from tailor_engine.ops.packed import PackedWeight
from tailor_engine.stages.prune.cut import cut_channels, cut_heads, cut_hidden
from tests.tiny import tiny

IDS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))
#: Shapes that are alike in all blocks, so that stock transformers loads them.
PLAIN = ("uniform", "dropped", "sliding", "full", "groups", "queries", "hidden")


def logits_of(network):
    with torch.inference_mode():
        return network(IDS).logits


def narrow(model, widths):
    """Cut each block's feed-forward part to its first channels."""
    for block, width in zip(model.family.blocks_of(model.network), widths, strict=True):
        cut_channels(model.family, block, torch.arange(width), None)
    families.write_shapes(model.network)


def keep_heads(model, kept):
    """Cut each block's attention to these query heads, a row of them a key-value head."""
    for block, heads in zip(model.family.blocks_of(model.network), kept, strict=True):
        cut_heads(model.family, block, torch.tensor(heads), None)
    families.write_shapes(model.network)


def mix(model):
    """Leave a network of four blocks no two of which are alike; there is no first attention."""
    blocks = model.family.blocks_of(model.network)
    families.leave_out(model.family, blocks[0], "attention")
    families.leave_out(model.family, blocks[2], "mlp")
    cut_heads(model.family, blocks[1], torch.tensor([[2, 3]]), None)
    cut_heads(model.family, blocks[3], torch.tensor([[0], [2]]), None)
    cut_channels(model.family, blocks[3], torch.arange(0, 128, 2), None)
    families.write_shapes(model.network)


def quantized(model, bits=4):
    """Pack all matrices, embedding and head with them, and return the model."""
    network, family = copy.deepcopy(model.network), model.family
    for _, part, linear in list(family.linears(network)):
        packed = PackedWeight.quantize(linear.weight.detach(), bits, 32 if bits == 4 else 0)
        put(network, linear, QuantizedLinear(packed, linear.bias), part)
    embedding, head = family.embedding_of(network), family.head_of(network)
    first = PackedWeight.quantize(embedding.weight.detach(), 8)
    tied = family.tied(network)
    last = first if tied else PackedWeight.quantize(head.weight.detach(), 8)
    put(network, embedding, QuantizedEmbedding.replacing(embedding, first))
    put(network, head, QuantizedLinear(last))
    fuse(network, family)  # as the quantize stage and loading do
    return model.replace(network=network)


def put(network, old, new, _part=None):
    path = next(name for name, module in network.named_modules() if module is old)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, new)


def variants(family_name):
    """Return {variant: Model}: every structure that a stage can leave behind."""
    result = {name: tiny(family_name, layers=4) for name in (*PLAIN, "layered", "mixed")}
    narrow(result["uniform"], [96] * 4)
    keep_heads(result["groups"], [[[2, 3]], [[0, 1]]] * 2)
    keep_heads(result["queries"], [[[0], [3]], [[1], [2]]] * 2)
    hidden = result["hidden"]
    cut_hidden(hidden.family, hidden.network, torch.arange(0, 64, 2), {})
    for name, kept in (("dropped", [0, 2, 3]), ("sliding", [0, 2]), ("full", [1, 3])):
        families.drop_blocks(result[name].network, kept)  # to one kind of attention, the last two
    narrow(result["layered"], [96, 128, 80, 128])
    families.drop_blocks(result["layered"].network, [0, 1, 2])
    mix(result["mixed"])
    for name in ("layered", "mixed"):
        result[f"{name}.quantized"] = quantized(result[name])
    return result
