"""Turn the matrices into int8 or int4 that run on our own products."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine import ops
from tailor_engine.data import Data
from tailor_engine.errors import UserError
from tailor_engine.fused import fuse
from tailor_engine.model import Model
from tailor_engine.modules import QuantizedEmbedding, QuantizedLinear
from tailor_engine.ops.channel_stats import ABS_MAX
from tailor_engine.ops.packed import PackedWeight
from tailor_engine.stages._precision import autocast
from tailor_engine.stages._stage import Report, context, option, stage
from tailor_engine.stages.quantize.rounding import Format, compensated, nearest
from tailor_engine.stages.quantize.smooth import smooth

#: Parts that read one input: the activations of the first speak for all.
SHARED_INPUTS = {
    "query": ("query", "key", "value"),
    "output": ("output",),
    "gate": ("gate", "up"),
    "down": ("down",),
}


@dataclass(frozen=True)
class QuantizeConfig:
    """Bits, groups, and what stays in full precision."""

    bits: int = option(4, "bits of a weight in the blocks", choices=(4, 8))
    group_size: int = option(32, "weights that share a scale, 4 bits only", choices=(32, 64, 128))
    symmetric: bool = option(False, "no zero points, 4 bits only")
    embedding_bits: int = option(
        8, "bits of the embedding and the head; 32 leaves them as they are", choices=(4, 8, 32)
    )
    skip: list = option([], "parts that stay in full precision, such as down")
    eight_bits: list = option([], "parts that take 8 bits where the rest takes 4, such as down")
    smoothing: float = option(
        0.5, "share of the activations' outliers moved into the weights; 0: none", low=0, high=1
    )
    method: str = option(
        "compensated",
        "compensated: each column repairs what those before it lost (GPTQ); nearest",
        choices=("compensated", "nearest"),
    )
    clip_search: bool = option(True, "search the clipping of each group that loses least")
    ridge: float = option(
        0.01, "damping of the compensation, of the mean diagonal", low=1e-8, high=1
    )
    rows: int = option(32, "calibration sequences; 0: unweighted rounding to nearest", low=0)
    sequence_length: int = option(256, "tokens a calibration sequence", low=16)
    domain_weight: float = option(0.5, "share of domain text in the calibration", low=0, high=1)
    quantize_activations: bool = option(True, "int8 activations, one scale a token")
    seed: int = option(0, "of the calibration rows", low=0)


@stage(QuantizeConfig)
def quantize(model: Model, config: QuantizeConfig, data: Data) -> tuple[Model, Report]:
    """Round the weights to int8 or int4, each group clipped where that loses least."""
    family = model.family
    unknown = {*config.skip, *config.eight_bits} - {
        part for group in SHARED_INPUTS.values() for part in group
    }
    if unknown:
        raise UserError(f"quantize: {min(unknown)!r} is no part of a block")
    network = copy.deepcopy(model.network)
    inputs = input_statistics(model, config, data) if config.rows else {}
    blocks = family.blocks_of(network)
    errors: list[dict[str, float]] = []
    for index, block in enumerate(blocks):
        lost: dict[str, float] = {}
        known = inputs.pop(index, {})
        if known and config.smoothing:
            heads = model.config.num_attention_heads
            largest = {part: statistics.largest for part, statistics in known.items()}
            for part, s in smooth(family, block, heads, largest, config.smoothing).items():
                known[part].moment /= s[:, None] * s
        for first, parts in SHARED_INPUTS.items():
            moment = known[first].moment if known else None
            for part in parts:
                if part in config.skip:
                    continue
                linear = family.part(block, part)
                bits = 8 if part in config.eight_bits else config.bits
                packed, lost[part] = pack(linear.weight, _format(config, bits), config, moment)
                module = QuantizedLinear(packed, linear.bias, config.quantize_activations)
                _put(block, getattr(family, part), module)
        errors.append(lost)
        context().progress(index + 1, len(blocks), "quantizing blocks")
    if config.embedding_bits != 32:
        _quantize_ends(model, network, config)
    fuse(network, family)
    metrics = {"output_error": errors}
    report = Report("quantize", dataclasses.asdict(config), metrics=metrics)
    return model.replace(network=network), report


def pack(
    weight: Tensor, form: Format, config: QuantizeConfig, moment: Tensor | None
) -> tuple[PackedWeight, float]:
    """Pack one weight [N, K]; return it with the relative error of the layer's output.

    Shapes: moment [K, K], the mean of x x^T over the layer's inputs; None: the identity.
    """
    dense = weight.detach().float()
    with torch.no_grad():
        if (
            moment is None
            or config.method == "nearest"
            or (form.group and dense.shape[1] % form.group)
        ):
            packed = nearest(dense, form, None if moment is None else moment.diagonal().float())
        else:
            packed = compensated(dense, form, moment, config.ridge)
        change = packed.dequantize() - dense
        return packed, (
            _energy(change, moment) / _energy(dense, moment).clamp_min(1e-30)
        ).sqrt().item()


@dataclass
class Inputs:
    """What a layer reads: the mean of x x^T [K, K] and the absolute maximum of each channel [K]."""

    moment: Tensor
    largest: Tensor


def input_statistics(
    model: Model, config: QuantizeConfig, data: Data
) -> dict[int, dict[str, Inputs]]:
    """Return {block: {first part that reads an input: Inputs}}, in one streaming pass."""
    rows = data.mixed(
        "calibration",
        model.tokenizer,
        config.sequence_length,
        config.rows,
        config.domain_weight,
        config.seed,
    )
    totals: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    valid = torch.empty(0)
    handles = []

    def watch(key: tuple[int, str]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            if key not in totals:
                empty = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                totals[key] = (empty, torch.zeros(5, x.shape[1], device=x.device))
            ops.gram(x, valid, totals[key][0])
            ops.channel_stats(x, valid, totals[key][1])

        return hook

    family, network = model.family, model.network
    for index, block in enumerate(family.blocks_of(network)):
        for part in SHARED_INPUTS:
            module = family.part(block, part)
            handles.append(module.register_forward_pre_hook(watch((index, part))))
    try:
        with torch.inference_mode(), autocast(model.device):
            for start in range(0, len(rows), 8):
                batch = rows[start : start + 8]
                valid = batch.valid.flatten().to(model.device)
                family.body_of(network)(
                    input_ids=batch.input_ids.to(model.device),
                    position_ids=batch.position_ids.to(model.device),
                    use_cache=False,
                )
                context().progress(start + len(batch), len(rows), "calibrating")
    finally:
        for handle in handles:
            handle.remove()
    count = int(rows.valid.sum())
    found: dict[int, dict[str, Inputs]] = {}
    for (index, part), (total, stats) in totals.items():
        if not torch.isfinite(total).all():
            raise UserError(f"quantize: the inputs of {part} in block {index} are not finite")
        found.setdefault(index, {})[part] = Inputs(total / count, stats[ABS_MAX])
    return found


def _quantize_ends(model: Model, network: Any, config: QuantizeConfig) -> None:
    """Pack the embedding and the head; tied ones share one weight."""
    family = model.family
    embedding, head = family.embedding_of(network), family.head_of(network)
    tied = family.tied(network)
    form = _format(config, config.embedding_bits)
    packed = nearest(embedding.weight.detach().float(), form, None)
    shared = packed if tied else nearest(head.weight.detach().float(), form, None)
    _put(network, family.embedding, QuantizedEmbedding.replacing(embedding, packed))
    _put(
        network,
        family.head,
        QuantizedLinear(shared, getattr(head, "bias", None), config.quantize_activations),
    )


def _format(config: QuantizeConfig, bits: int) -> Format:
    if bits == 8:
        return Format(8, 0, True, config.clip_search)
    return Format(4, config.group_size, config.symmetric, config.clip_search)


def _energy(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Return E |W x|^2 = tr(W M W^T)."""
    return (weight.square() if moment is None else (weight @ moment) * weight).sum()


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
