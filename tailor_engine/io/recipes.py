"""Recipes: a YAML file that names a model, the data and the stages with their settings."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tailor_engine import stages
from tailor_engine.errors import UserError
from tailor_engine.io.text import SourceOptions
from tailor_engine.stages._repeat import expand
from tailor_engine.stages._stage import make_config

KEYS = ("model", "domain", "general", "seed", "evaluate", "stages")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every setting is there, defaults included."""

    name: str
    model: str
    domain: Any  # a name, a path, or a mapping for io.text
    general: Any = None
    seed: int = 0
    evaluate: Any = None  # an EvaluateConfig
    stages: tuple[tuple[str, Any], ...] = ()  # (stage, config)
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as YAML holds it."""
        steps = [{name: dataclasses.asdict(config)} for name, config in self.stages]
        return {
            "model": self.model,
            "domain": self.domain,
            "general": self.general,
            "seed": self.seed,
            "evaluate": dataclasses.asdict(self.evaluate),
            "stages": steps,
        }

    def as_yaml(self) -> str:
        """Return the resolved recipe as YAML text."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=100)


class RecipeError(UserError):
    """A recipe with faults: one line each in `faults`."""

    def __init__(self, name: str, faults: list[str]) -> None:
        self.faults = [f"{name}: {fault}" for fault in faults]
        more = len(faults) - 1
        rest = f" (and {more} more; see `tailor recipe check`)" if more else ""
        super().__init__(self.faults[0] + rest)


def find(name: str) -> Path:
    """Return the file that a recipe argument means: a path, or the name of an embedded recipe.

    Raises:
        UserError: there is no such file; the embedded recipes are listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(importlib.resources.files("tailor_engine"))) / "assets" / "recipes"
    embedded = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name in embedded:
        return embedded[name]
    raise UserError(
        f"{name}: no such recipe file; the embedded recipes are {', '.join(embedded) or 'none'}"
    )


def load(name: str, changes: list[str] | None = None) -> Recipe:
    """Read, change (`stages.prune.target=0.7`) and check a recipe.

    Raises:
        RecipeError: one line for each fault, with the nearest right key.
        UserError: no such file, or not YAML.
    """
    path = find(name)
    values = parse(path.read_text(encoding="utf-8", errors="replace"), path.name)
    for change in changes or []:
        _change(values, change)
    return check(values, path.stem, path.name)


def parse(text: str, where: str) -> dict[str, Any]:
    """Read YAML as a mapping; refuse a key that is given twice."""
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys such as model, domain, stages; found no mapping")
    return values


def check(values: dict[str, Any], name: str, where: str) -> Recipe:
    """Check a recipe's values and fill in the defaults.

    Raises:
        RecipeError: one line for each fault.
    """
    faults: list[str] = []
    for key in values:
        if key not in KEYS:
            faults.append(
                f"unknown key {key!r}{nearest(key, KEYS)} The keys are {', '.join(KEYS)}."
            )
    for key in ("model", "domain"):
        if values.get(key) in (None, ""):
            faults.append(f"{key} is missing")
    if values.get("model") is not None and not isinstance(values["model"], str):
        faults.append(f"model must be a name or a path, got {values['model']!r}")
    for key in ("domain", "general"):
        if values.get(key) not in (None, ""):
            try:
                data_source(values[key])
            except UserError as error:
                faults.append(f"{key}: {error}")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        faults.append(f"seed must be an integer >= 0, got {seed!r}")
        seed = 0
    evaluate = _section("evaluate", values.get("evaluate") or {}, "evaluate", {}, faults)
    steps = _steps(values.get("stages"), seed, faults)
    if faults:
        raise RecipeError(where, faults)
    return Recipe(
        name=name,
        model=values["model"],
        domain=values["domain"],
        general=values.get("general"),
        seed=seed,
        evaluate=evaluate,
        stages=tuple(steps),
    )


def data_source(described: Any) -> tuple[str, dict[str, Any]]:
    """Split a recipe's domain or general entry into the source and its options.

    Raises:
        UserError: neither a name nor a mapping with `source`, or an unknown option.
    """
    if isinstance(described, str) and described:
        return described, {}
    if not isinstance(described, dict) or not isinstance(described.get("source"), str):
        raise UserError(f"expected a name, a path or a mapping with source, got {described!r}")
    options = {key: value for key, value in described.items() if key != "source"}
    make_config(SourceOptions, options, described["source"])
    return described["source"], options


def nearest(word: object, known: Any) -> str:
    """Return a hint with the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), 1, 0.4)
    return f"; did you mean {near[0]!r}?" if near else ";"


def _steps(items: Any, seed: int, faults: list[str]) -> list[tuple[str, Any]]:
    if not isinstance(items, list) or not items:
        faults.append(
            f"stages must be a list such as [prune, {{quantize: {{bits: 4}}}}], got {items!r}"
        )
        return []
    try:
        items = list(expand(items))
    except UserError as error:
        faults.append(f"stages: {error}")
        return []
    steps = []
    for number, item in enumerate(items, 1):
        if isinstance(item, dict) and len(item) == 1:
            name, section = next(iter(item.items()))
        else:
            name, section = item, {}
        if not isinstance(name, str):
            faults.append(f"stages, item {number}: expected one stage's name, got {item!r}")
            continue
        try:
            stages.check_name(name)
        except UserError as error:
            faults.append(f"stages, item {number}: {error}")
            continue
        config = _section(name, section or {}, f"stages.{name}", {"seed": seed}, faults)
        steps.append((name, config))
    return steps


def _section(
    stage: str, section: Any, where: str, defaults: dict[str, Any], faults: list[str]
) -> Any:
    """Make a stage's config; every faulty key is one fault."""
    config_type = stages.config_type(stage)
    if not isinstance(section, dict):
        faults.append(f"{where} must be a mapping of keys, got {section!r}")
        return None
    known = {item.name for item in dataclasses.fields(config_type)}
    before = len(faults)
    for key, entry in section.items():
        try:
            make_config(config_type, {key: entry}, where)
        except UserError as error:
            faults.append(str(error))
    if len(faults) > before:
        return None
    given = {key: value for key, value in defaults.items() if key in known} | section
    try:
        return make_config(config_type, given, where)
    except UserError as error:
        faults.append(str(error))
        return None


def _change(values: dict[str, Any], change: str) -> None:
    """Apply one `path=value`; a stage is named by its name or by its position in the list."""
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise UserError(f"--set {change}: expected KEY=VALUE, such as stages.prune.target=0.7")
    value = parse_value(text)
    head, *rest = path.split(".")
    if head != "stages" or not rest:
        target = values
        for key in [head, *rest][:-1]:
            target[key] = target.get(key) or {}
            if not isinstance(target[key], dict):
                target[key] = {"path": target[key]}
            target = target[key]
        target[path.split(".")[-1]] = value
        return
    if len(rest) != 2:
        raise UserError(f"--set {change}: expected stages.NAME.KEY=VALUE")
    items = values.get("stages") or []
    names = [next(iter(item)) if isinstance(item, dict) else item for item in items]
    places = [i for i, name in enumerate(names, 1) if rest[0] in (name, str(i))]
    if len(places) != 1:
        reason = f"is there {len(places)} times; use its position" if places else "is not there"
        raise UserError(
            f"--set {change}: stage {rest[0]!r} {reason} ({', '.join(map(str, names))})"
        )
    place = places[0] - 1
    if not isinstance(items[place], dict):
        items[place] = {names[place]: {}}
    section = items[place][names[place]] or {}
    items[place][names[place]] = section | {rest[1]: value}


def parse_value(text: str) -> Any:
    """Read one value as a recipe would: a number, true, null, a list, or the text itself."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


class _Loader(yaml.SafeLoader):
    """YAML with `1e-4` as a number, and without repeated keys."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", node.value[position][0].start_mark
            )
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
