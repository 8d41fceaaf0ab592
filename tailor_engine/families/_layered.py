"""Networks whose blocks differ in shape, through transformers' own Auto classes and config fields.

transformers reads and writes `config.per_layer_config`, but its Llama, Mistral, Qwen and Gemma code
builds every block from one config. After `import tailor_engine`, `AutoModelForCausalLM` answers a
config with per-layer widths, heads or sub-layers to `skip` by a subclass of the stock class that
builds each block with its own; every other config gets the stock class as before. The folder holds
nothing of ours; without this module transformers refuses to load it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterable
from typing import Any

from tailor_engine.errors import UserError

#: What may differ between blocks; `skip` names sub-layers that are left out.
HEADS = {"num_attention_heads", "num_key_value_heads"}
KEYS = {"intermediate_size", *HEADS, "skip"}


@functools.cache
def layered(stock: Any) -> type:
    """Return the subclass of a stock class that gives each block its own shape."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from tailor_engine import families

        overrides = config.to_dict()["per_layer_config"]
        _check(overrides, config.model_type)
        config.per_layer_config = None  # stock code builds all blocks alike,
        stock.__init__(self, config, *args, **kwargs)
        self.config.per_layer_config = overrides  # then those that differ are built again
        family = families.find(config)
        blocks = family.blocks_of(self)
        for index, override in overrides.items():
            _rebuild(family, blocks[int(index)], int(index), override, self.config)
        self.init_weights()

    # The stock name, because transformers writes it into config.json's `architectures`.
    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": __name__})


def _check(overrides: dict[str, dict[str, Any]], model_type: str) -> None:
    """Require that only what can differ between blocks does."""
    unknown = {key for layer in overrides.values() for key in layer} - KEYS
    if unknown:
        raise UserError(
            f"per_layer_config: {', '.join(sorted(unknown))} cannot differ between blocks of "
            f"{model_type} here; only {', '.join(sorted(KEYS))} can"
        )
    skipped = {name for layer in overrides.values() for name in layer.get("skip", ())}
    if skipped - {"attention", "mlp"}:
        raise UserError(
            f"per_layer_config: skip may name attention and mlp, got {', '.join(sorted(skipped))}"
        )


def _rebuild(family: Any, block: Any, index: int, override: dict[str, Any], config: Any) -> None:
    """Build the sub-layers of a block again that are not like most blocks'."""
    from tailor_engine.families._left_out import leave_out

    own, skip = config.per_layer_config[index], override.get("skip", ())
    if "intermediate_size" in override and "mlp" not in skip:
        setattr(block, family.mlp, type(family.part(block, "mlp"))(own))
    if HEADS & override.keys() and "attention" not in skip:
        attention = type(family.part(block, "attention"))(own, index)
        attention.config = config  # where a later choice of the implementation is written
        setattr(block, family.attention, attention)
    for name in skip:
        leave_out(family, block, name)
    if "attention" in skip:
        family.part(block, "attention").key_value_heads = own.num_key_value_heads


class _ByConfig:
    """What `AutoModelForCausalLM` finds for a config class: picks the stock class or `layered`.

    The stock class is imported at first use, since its code takes seconds to import.
    """

    def __init__(self, config_class: type, class_name: str) -> None:
        self.config_class = config_class
        self.__name__ = class_name

    @property
    def stock(self) -> Any:
        import transformers

        return getattr(transformers, self.__name__)

    def for_config(self, config: Any) -> Any:
        return layered(self.stock) if config.is_heterogeneous else self.stock

    def from_pretrained(self, *args: Any, config: Any, **kwargs: Any) -> Any:
        return self.for_config(config).from_pretrained(*args, config=config, **kwargs)

    def _from_config(self, config: Any, **kwargs: Any) -> Any:
        return self.for_config(config)._from_config(config, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


def __getattr__(name: str) -> Any:
    """Find the subclass of a stock class here by its name, as unpickling a network does."""
    if not name.endswith("ForCausalLM"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import transformers

    return layered(getattr(transformers, name))


def _register(model_types: Iterable[str]) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in model_types:
        config_class = CONFIG_MAPPING[model_type]
        value: Any = _ByConfig(config_class, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        AutoModelForCausalLM.register(config_class, value, exist_ok=True)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers once transformers is imported: importing it for the ops alone would cost 0.7 s.

    Not later, on its Auto classes: those are first imported from within half-imported modules.
    """

    def __init__(self, model_types: Iterable[str]) -> None:
        self.model_types = model_types

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None:
            self.inner: Any = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.inner
        self.inner.exec_module(module)
        _register(self.model_types)


def register(model_types: Iterable[str]) -> None:
    """Make `AutoModelForCausalLM` load blocks of different widths, now or when it is imported."""
    if "transformers" in sys.modules:
        _register(model_types)
    else:
        sys.meta_path.insert(0, _AfterImport(model_types))
