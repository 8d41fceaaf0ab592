"""Low-rank adapters through peft, put into a network in place and merged out of it again."""

from __future__ import annotations

from typing import Any

import torch

from tailor_engine.families._family import PARTS, Family


def add_adapter(
    network: Any, family: Family, rank: int, alpha: int, dropout: float, seed: int
) -> None:
    """Freeze the network and give each matrix of its blocks a trainable low-rank term.

    Numbers: weight + (alpha / rank) * B A, with A [rank, K] random and B [N, rank] zero at first.
    Source: LoRA (Hu et al. 2021, arXiv:2106.09685), equation 3.
    """
    import peft

    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[getattr(family, part) for part in PARTS],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(lora)


def merge_adapter(network: Any) -> None:
    """Add each low-rank term to its matrix and leave plain linear layers behind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, module.get_base_layer())
    network._hf_peft_config_loaded = False
    network.__dict__.pop("peft_config", None)
    network.requires_grad_(True)
