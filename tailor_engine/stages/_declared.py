"""Read a stage's config from its source, so that help and recipe checks need not import torch.

A stage module imports torch, which takes seconds; its config is a dataclass of literals. So the
config's class statement, and what it names, are run alone. Where that is not possible the module
is imported as usual: same answer, later.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import importlib.machinery
import importlib.util
import pkgutil
import sys
import types
from typing import Any

_STAGES = "tailor_engine.stages"
_LIGHT = {f"{_STAGES}._stage", "tailor_engine.errors"}  # ours that import nothing heavy


class _Heavy(Exception):
    """A name that only the real module can give."""


@functools.cache
def declaration(stage: str) -> tuple[type, str] | None:
    """Return a stage's config type and summary, or None where the module must be imported."""
    try:
        module, function = _origin(f"{_STAGES}.{stage}", stage)
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "stage":
                config = _value(module, ast.unparse(decorator.args[0]))
                return config, (ast.get_docstring(function) or "").split("\n")[0]
    except _Heavy:
        pass
    return None


def value(module: str, name: str) -> Any:
    """Return what a module binds to a name, from its source alone if that is possible."""
    try:
        return _value(module, name)
    except _Heavy:
        return getattr(importlib.import_module(module), name)


@functools.cache
def _source(module: str) -> tuple[ast.Module, str]:
    """Return a module's syntax tree and the package that its relative imports start from."""
    spec = _spec(module)
    source = getattr(spec and spec.loader, "get_source", lambda name: None)(module)
    if spec is None or source is None:
        raise _Heavy(module)
    return ast.parse(source), spec.parent or ""


@functools.cache
def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module without importing the packages that it is in, as find_spec would."""
    parent = module.rpartition(".")[0]
    if not parent or parent in sys.modules:
        return importlib.util.find_spec(module)
    above = _spec(parent)
    folders = above.submodule_search_locations if above else None
    return importlib.machinery.PathFinder.find_spec(module, folders)


def _origin(module: str, name: str) -> tuple[str, ast.FunctionDef]:
    """Return the module that defines a function, and its definition."""
    tree, package = _source(module)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _origin(_absolute(node, package), alias.name)
    raise _Heavy(f"{module}.{name}")


@functools.cache
def _namespace(module: str) -> types.ModuleType:
    """Return the stand-in of a module; dataclasses look their module up by name."""
    name = f"declared:{module}"
    stand_in = sys.modules[name] = types.ModuleType(name)

    def attribute(wanted: str) -> Any:
        if wanted.startswith("__"):  # whoever walks sys.modules asks for these
            raise AttributeError(wanted)
        return _value(module, wanted)

    stand_in.__dict__["__getattr__"] = attribute
    return stand_in


def _value(module: str, name: str) -> Any:
    """Return what a name means at the top of a module, running only the statement that binds it."""
    space = _namespace(module).__dict__
    if name in space:
        return space[name]
    tree, package = _source(module)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    space[name] = _imported(node, alias.name, package)
                    return space[name]
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            space[name] = functools.partial(_call, module, name)
            return space[name]
        elif (isinstance(node, ast.ClassDef) and node.name == name) or _binds(node, name):
            read = node if isinstance(node, ast.ClassDef) else getattr(node, "value", node)
            for used in sorted(_names(read) - {name}):
                if not hasattr(builtins, used):
                    _value(module, used)
            future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
            body = ast.fix_missing_locations(ast.Module([future, node], []))
            exec(compile(body, module, "exec"), space)
            return space[name]
    raise _Heavy(f"{module}.{name}")


def _call(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a function: a table that names it can be read without its module."""
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def _imported(node: ast.Import | ast.ImportFrom, name: str, package: str) -> Any:
    source = name if isinstance(node, ast.Import) else _absolute(node, package)
    if source.startswith(_STAGES) and source not in _LIGHT:
        submodule = f"{source}.{name}"
        if _is_module(submodule):
            return _namespace(submodule)
        return _value(source, name)
    if source.split(".")[0] not in sys.stdlib_module_names and source not in _LIGHT:
        raise _Heavy(source)
    imported = importlib.import_module(source)
    return imported if isinstance(node, ast.Import) else getattr(imported, name)


def _is_module(name: str) -> bool:
    parent, _, last = name.rpartition(".")
    spec = _spec(parent)
    folders = spec.submodule_search_locations if spec else None
    return any(found.name == last for found in pkgutil.iter_modules(folders or []))


def _absolute(node: ast.ImportFrom, package: str) -> str:
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _binds(node: ast.stmt, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _names(node: ast.AST) -> set[str]:
    """Return the names that a statement or expression reads; the bodies of methods are not run."""
    skipped = {
        id(child)
        for part in ast.walk(node)
        if isinstance(part, ast.FunctionDef)
        for child in ast.walk(part)
    }
    return {
        part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and id(part) not in skipped
    }
