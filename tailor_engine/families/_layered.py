"""Networks whose blocks differ in width, through transformers' own Auto classes and config fields.

transformers reads and writes `config.per_layer_config`, but its Llama, Mistral, Qwen and Gemma code
builds every block from one `intermediate_size`. After `import tailor_engine`,
`AutoModelForCausalLM` answers a config with per-layer widths by a subclass of the stock class that
builds each block with its own; every other config gets the stock class as before. The folder holds
nothing of ours; without this module transformers raises AmbiguousGlobalPerLayerAttributeError.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterable
from typing import Any

from tailor_engine.errors import UserError


@functools.cache
def layered(stock: Any) -> type:
    """Return the subclass of a stock class that gives each block its own feed-forward width."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from tailor_engine import families

        overrides = config.to_dict()["per_layer_config"]
        unknown = {key for layer in overrides.values() for key in layer} - {"intermediate_size"}
        if unknown:
            raise UserError(
                f"per_layer_config: {', '.join(sorted(unknown))} cannot differ between blocks of "
                f"{config.model_type} here; only intermediate_size can"
            )
        config.per_layer_config = None  # stock code builds all blocks alike,
        stock.__init__(self, config, *args, **kwargs)
        self.config.per_layer_config = overrides  # then those that differ are built again
        family = families.find(config)
        for index, block in enumerate(family.blocks_of(self)):
            if str(index) in {key.lstrip("0") or "0" for key in overrides}:
                mlp = type(family.part(block, "mlp"))(self.config.per_layer_config[index])
                setattr(block, family.mlp, mlp)
        self.init_weights()

    # The stock name, because transformers writes it into config.json's `architectures`.
    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": __name__})


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
