"""The embedded domain corpus: what Python's own documentation says, read from this interpreter.

The standard library's sources are parsed, not imported, so nothing runs and the result depends on
the interpreter's version alone. Language topics and modules become passages; functions, classes
and methods become questions with their docstring as the answer. Each text is used once.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import platform
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailor_engine.data import Document
from tailor_engine.errors import UserError

# Tests, demos, windows on a screen, tables and jokes: no documentation of the language.
SKIPPED_MODULES = frozenset(
    {
        *("antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3"),
        *("pydoc_data", "ensurepip", "encodings", "distutils", "msilib"),
    }
)
SKIPPED_FOLDERS = frozenset({"test", "tests", "__pycache__", "site-packages", "idle_test"})
# Compiled into every interpreter, without a source to parse and without effects when imported.
BUILTIN_MODULES = ("builtins", "array", "cmath", "itertools", "math", "time", "sys", "zlib")
SHORTEST = 60  # characters; "See base class." teaches nothing
QUESTIONS = {
    "function": (
        "What does `{name}` do?",
        "Explain the Python function `{name}`.",
        "How do I use `{name}`?",
        "What is `{name}` for?",
    ),
    "method": (
        "What does the method `{name}` do?",
        "Explain `{name}`.",
        "When would I call `{name}`?",
        "What happens when I call `{name}`?",
    ),
    "class": (
        "What is the class `{name}`?",
        "What is `{name}` in Python?",
        "Describe the class `{name}`.",
        "What is `{name}` used for?",
    ),
}


def python_docs() -> list[Document]:
    """Topics and module descriptions as passages, everything else as question and answer.

    Raises: UserError where this Python was installed without the sources of its library.
    """
    seen: set[str] = set()
    documents = [Document(text) for text in _topics(seen)]
    root = Path(sysconfig.get_path("stdlib"))
    sources = list(_sources(root))
    if not sources:
        raise UserError(f"no standard-library sources under {root}; give another data set")
    with _collector_paused():
        for module, path in sources:
            documents += _module_documents(module, ast.parse(path.read_bytes()), seen)
    for module in BUILTIN_MODULES:
        documents += _builtin_documents(module, seen)
    return documents


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector from searching millions of syntax nodes: 3.4 s become 1.0."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def python_docs_recipe() -> dict[str, str]:
    """Where the text comes from, for the manifest."""
    return {
        "source": "pydoc_data.topics and standard-library docstrings of the running interpreter",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "licence": "Python Software Foundation License Version 2",
    }


def _topics(seen: set[str]) -> Iterator[str]:
    """Language topics, longest first; a paragraph that an earlier one held is left out.

    "compound" repeats "if", "for" and "try" in full: left in, test text would stand in train too.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < SHORTEST or key not in seen:
                fresh.append(paragraph.rstrip())
            seen.add(key)
        text = "\n\n".join(fresh).strip()
        if len(text) >= 4 * SHORTEST:
            yield from _sections(text)


def _sections(text: str, most: int = 6000) -> Iterator[str]:
    """Cut a long topic where a heading is underlined, so that no document outweighs a split."""
    paragraphs = text.split("\n\n")
    section: list[str] = []
    size = 0
    for paragraph in paragraphs:
        underline = paragraph.split("\n")[-1].strip()
        is_heading = len(underline) >= 3 and set(underline) <= set('=-~*"^')
        if section and (size >= most or (is_heading and size >= most // 4)):
            yield "\n\n".join(section)
            section, size = [], 0
        section.append(paragraph)
        size += len(paragraph)
    yield "\n\n".join(section)


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Every public module of the standard library that has a source file, by dotted name."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED_MODULES:
            continue
        if (root / f"{name}.py").is_file():
            yield name, root / f"{name}.py"
        for path in sorted((root / name).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(p in SKIPPED_FOLDERS or p.startswith("_") for p in parts):
                yield ".".join(parts), path


def _module_documents(module: str, tree: ast.Module, seen: set[str]) -> Iterator[Document]:
    text = _fresh(ast.get_docstring(tree), seen)
    if text:
        yield Document(f"The module {module}\n\n{text}")
    yield from _definitions(tree, module, "function", seen)


def _definitions(
    parent: ast.Module | ast.ClassDef, prefix: str, kind: str, seen: set[str]
) -> Iterator[Document]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        text = _fresh(ast.get_docstring(node), seen)
        if isinstance(node, ast.ClassDef):
            if text:
                yield _question("class", name, f"class {name}", text)
            yield from _definitions(node, name, "method", seen)
        elif text:
            yield _question(kind, name, f"{name}({ast.unparse(node.args)})", text)


def _builtin_documents(module: str, seen: set[str]) -> Iterator[Document]:
    """Documents of a module that is written in C, from its objects' own docstrings."""
    imported = importlib.import_module(module)
    for name, value in sorted(vars(imported).items()):
        if name.startswith("_") or not callable(value):
            continue
        full = name if module == "builtins" else f"{module}.{name}"
        text = _fresh(inspect.getdoc(value), seen)
        is_class = isinstance(value, type)
        if text:
            kind = "class" if is_class else "function"
            yield _question(kind, full, full + _signature(value), text)
        if is_class and value.__module__ == module and not issubclass(value, BaseException):
            for key, member in sorted(vars(value).items()):
                text = "" if key.startswith("_") else _fresh(inspect.getdoc(member), seen)
                if text and callable(member):
                    call = f"{full}.{key}{_signature(member)}"
                    yield _question("method", f"{full}.{key}", call, text)


def _signature(value: Any) -> str:
    """Give the signature of an object written in C, "" where it declares none."""
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""


def _question(kind: str, name: str, signature: str, text: str) -> Document:
    """Ask about a name; the question's wording depends on the name alone."""
    forms = QUESTIONS[kind]
    question = forms[sum(map(ord, name)) % len(forms)].format(name=name)
    return Document.from_messages([("user", question), ("assistant", f"`{signature}`\n\n{text}")])


def _fresh(docstring: str | None, seen: set[str]) -> str:
    """Give the docstring, or "" where it is too short or was met before."""
    text = inspect.cleandoc(docstring or "").strip()
    key = " ".join(text.split())
    if len(key) < SHORTEST or key in seen:
        return ""
    seen.add(key)
    return text
