"""The arrows of the house: who may import whom, who prints, who touches the disk."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tailor_engine.ops import OPS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tailor_engine"
SOURCES = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))

# Room -> what it may import of this project. A room not named here stands at the door of none.
ARROWS = {
    "errors": set(),
    "kernels": {"kernels"},
    "ops": {"ops", "errors", "kernels"},
    "modules": {"ops", "errors"},
    "families": {"families", "errors"},
    "decode": {"decode", "families", "modules", "ops", "errors"},
    "fused": {"decode", "families", "modules", "ops"},
    "model": {"families", "ops", "errors", "modules"},
    "documents": {"errors"},
    "rows": {"documents", "errors"},
    "data": {"documents", "rows", "errors"},
    "prompts": set(),
    "corpus": {"prompts", "data", "model", "errors", "stages"},
    "stages": {"stages", "families", "data", "model", "modules", "fused", "ops", "errors"},
    "diagnostics": {"diagnostics", "stages", "families", "data", "model", "ops", "errors"},
    "io": {"io", "model", "families", "modules", "fused", "data", "ops", "errors", "stages"}
    | {"diagnostics"},
    "pipeline": {"stages", "io", "data", "model", "families", "ops", "errors"},
}


def room(path):
    """Return the room that a file stands in: its package, or its own name at the top."""
    if ROOT / "kernels" in path.parents:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def project_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        for name in names:
            if name and name.startswith("tailor_engine."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    here = room(path)
    if here in {"__init__", "cli"}:
        return  # the two doors see everything
    imported = set(project_imports(ast.parse(path.read_text())))
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()} | {"kernels"}
    strangers = (imported & rooms) - ARROWS[here] - {here}
    assert not strangers, f"{here} may not import {sorted(strangers)}"


def test_stages_do_not_import_one_another():
    names = {p.name.removesuffix(".py") for p in (PACKAGE / "stages").iterdir()}
    public = {name for name in names if not name.startswith("_")}
    for path in (PACKAGE / "stages").rglob("*.py"):
        own = path.relative_to(PACKAGE / "stages").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        found = re.findall(
            r"^\s*(?:from|import) tailor_engine\.stages\.(\w+)", path.read_text(), re.M
        )
        assert not (set(found) & public) - {own}, f"{path.name} imports another stage"


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints_and_only_io_touches_the_disk(path):
    called = set(calls(ast.parse(path.read_text())))
    if room(path) != "cli":
        assert "print" not in called
    if room(path) not in {"io", "cli"}:
        disk = {"open", "torch.save", "torch.load", "os.replace", "shutil.rmtree", "os.makedirs"}
        methods = {
            c for c in called if c.endswith((".write_text", ".write_bytes", ".save_pretrained"))
        }
        assert not (called & disk | methods)


def test_every_native_symbol_and_kernel_file_is_a_declared_op():
    listed = re.search(
        r"#define TAILOR_OPS\(X\)(.*?)\n\s*\n", _text("csrc/cpu/ops.h") + "\n\n", re.S
    )
    kernels = set(re.findall(r"X\((\w+)\)", listed.group(1)))
    assert kernels <= set(OPS)
    kernels |= set(re.findall(r"X\((\w+)\)", _text("csrc/cpu/linear_config.h"))) - {"X"}
    probes = set(re.findall(r"X\((\w+)\)", _text("csrc/cpu/probes.h"))) - {"X"}
    used = set(re.findall(r"native\.(\w+)", _text("benchmarks/ceilings.py")))
    assert probes == used, "a probe is what the benchmark's ceilings are measured by, no more"
    steps = set(re.findall(r"X\((decode_\w+)\)", _text("csrc/cpu/ops.h")))
    assert steps == set(re.findall(r"native\.(\w+)", _text("tailor_engine/decode/_step.py")))
    native = importlib.import_module("tailor_engine._cpu")
    bound = {name for name in dir(native.baseline) if not name.startswith("_")}
    assert bound == kernels | steps | probes
    triton = {p.stem for p in (ROOT / "kernels/triton").glob("*.py") if not p.stem.startswith("_")}
    assert triton <= set(OPS)
    cuda = {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")}
    assert cuda <= set(OPS)


def test_an_op_is_declared_in_a_file_of_its_name():
    for name in OPS:
        assert f'"{name}"' in _text(f"tailor_engine/ops/{name}.py")


def test_the_top_level_kernels_folder_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_native_code_knows_nothing_of_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text())


def _text(name):
    return (ROOT / name).read_text()
