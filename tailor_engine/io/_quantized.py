"""Folders of quantized networks: packed tensors in canonical layout, and the way back.

    config.json               stock fields, and quantization_config {"quant_method": "tailor"}
    quantized.safetensors     `<module>.data/.scale/.zero` of each packed module, and what is dense
      its metadata            one JSON value: `<module>` -> kind, bits, group, shape, ...; or the
                              module that it shares its weight with. One, since safetensors writes
                              several in random order, and equal models must be equal files.

The weights do not bear transformers' name `model.safetensors` on purpose: transformers skips a
quantization method that it does not know, with a warning, and would fill the matrices with noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tailor_engine import families
from tailor_engine.errors import UserError
from tailor_engine.fused import fuse
from tailor_engine.io import files
from tailor_engine.modules import QuantizedEmbedding, QuantizedLinear
from tailor_engine.ops.packed import PackedWeight

WEIGHTS = "quantized.safetensors"
METHOD = "tailor"
FORMAT = 1


def is_quantized(network: nn.Module) -> bool:
    """Say whether any module of the network is packed."""
    return any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in network.modules())


def marked(folder: Path) -> bool:
    """Say whether a folder holds a network that `save` here wrote."""
    if not (folder / "config.json").is_file():
        return False
    described = files.read_json(folder / "config.json").get("quantization_config") or {}
    return described.get("quant_method") == METHOD


def save(network: Any, folder: Path) -> None:
    """Write a quantized network's weights and config."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    owners: dict[int, str] = {}
    packed_names: set[str] = set()
    for name, module in network.named_modules():
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            continue
        own = {f"{name}.{key}": tensor for key, tensor in module.packed.tensors().items()}
        packed_names |= own.keys()
        described: dict[str, Any] = _describe(module)
        owner = owners.setdefault(id(module.packed), name)
        if owner == name:
            tensors |= own
            described |= module.packed.metadata()
        else:
            described["shares"] = owner
        modules[name] = described
    seen: set[int] = set()
    for name, tensor in network.state_dict().items():
        if name not in packed_names and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {METHOD: json.dumps(modules, sort_keys=True)}
    save_file(contiguous, folder / WEIGHTS, metadata)
    described = network.config.to_diff_dict()
    described["dtype"] = str(network.dtype).removeprefix("torch.")
    described["architectures"] = [type(network).__name__]
    described["quantization_config"] = {"quant_method": METHOD, "format": FORMAT}
    files.atomic_write_json(folder / "config.json", dict(sorted(described.items())))
    network.generation_config.save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Return the network of a quantized folder; no dense copy of a packed weight is ever made.

    Raises:
        UserError: the weights are missing, damaged, of a newer format, or do not fit the config.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    version = config.quantization_config.get("format")
    if version != FORMAT:
        raise UserError(f"{folder}: quantized format {version}, this version reads {FORMAT}")
    del config.quantization_config
    path = folder / WEIGHTS
    check_header(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        _install(network, tensors, json.loads(metadata[METHOD]), dtype)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: does not fit its config.json ({words})") from error
    fuse(network, families.find(config))
    if (folder / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    return network


def check_header(path: Path) -> None:
    """Open a safetensors file's header, which tells whether the file is whole.

    Raises:
        UserError: the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though the model needs it") from None
    except SafetensorError as error:
        raise UserError(
            f"{path}: is damaged or not fully downloaded ({error}); get it again"
        ) from error


def _install(
    network: Any,
    tensors: dict[str, torch.Tensor],
    modules: dict[str, dict[str, Any]],
    dtype: torch.dtype,
) -> None:
    """Put packed modules and dense tensors into a network on the meta device."""
    weights: dict[str, PackedWeight] = {}
    for name, described in modules.items():
        owner = described.get("shares", name)
        if owner not in weights:
            own = {
                key: tensors.pop(f"{owner}.{key}")
                for key in ("data", "scale", "zero")
                if f"{owner}.{key}" in tensors
            }
            weights[owner] = PackedWeight.from_tensors(own, modules[owner])
        old = network.get_submodule(name)
        expected = tuple(old.get_parameter("weight").shape)
        if weights[owner].shape != expected:
            raise ValueError(f"{name} is {weights[owner].shape}, expected {expected}")
        parent, _, child = name.rpartition(".")
        bias = tensors[f"{name}.bias"].to(dtype) if described.get("bias") else None
        new = _build(described, weights[owner], bias, dtype)
        setattr(network.get_submodule(parent), child, new)
    if isinstance(network.get_input_embeddings(), QuantizedEmbedding):
        network.all_tied_weights_keys = {}  # what was tied shares one packed weight
    _materialize(network)
    dense = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    result = network.load_state_dict(dense, strict=False, assign=True)
    if network.all_tied_weights_keys:
        network.tie_weights()
    packed = {f"{name}.{key}" for name in modules for key in ("data", "scale", "zero")}
    missing = sorted(set(result.missing_keys) - packed - set(network.all_tied_weights_keys))
    if missing or result.unexpected_keys:
        raise ValueError(f"missing {missing[:1]}, not expected {result.unexpected_keys[:1]}")


def _materialize(network: Any) -> None:
    """Give memory to what is still on the meta device, and compute the buffers that no file holds.

    Those are the rotary frequencies and Gemma's embedding scale; transformers' own initialisation
    computes them. The dense weights are read from the file afterwards.
    """
    made: dict[int, torch.Tensor] = {}  # tied parameters stay one object
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = made.setdefault(
                    id(parameter), nn.Parameter(torch.empty_like(parameter, device="cpu"))
                )
                module.register_parameter(name, empty)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent)
    with torch.random.fork_rng(devices=[]):
        network.initialize_weights()


def _describe(module: QuantizedLinear | QuantizedEmbedding) -> dict[str, Any]:
    if isinstance(module, QuantizedEmbedding):
        return {"kind": "embedding", "embed_scale": module.embed_scale}
    return {
        "kind": "linear",
        "bias": module.bias is not None,
        "quantize_activations": module.quantize_activations,
    }


def _build(
    described: dict[str, Any], packed: PackedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> nn.Module:
    if described["kind"] == "embedding":
        return QuantizedEmbedding(packed, dtype, described["embed_scale"])
    return QuantizedLinear(packed, bias, described["quantize_activations"])
