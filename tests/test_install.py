"""A wheel built from this folder works from outside it, with nothing but its own files."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = """
import torch, tailor_engine
from tailor_engine import ops
from pathlib import Path
here = Path(tailor_engine.__file__)
assert {folder!r} in str(here), here
stats = torch.zeros(5, 8)
with tailor_engine.backend("cpu.baseline"):
    ops.channel_stats(torch.ones(4, 8), None, stats)
assert stats[1].tolist() == [4.0] * 8
import tailor_engine.kernels.channel_stats
print("works")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel in a copy, so that the checkout's own build is left alone."""
    if os.environ.get("TAILOR_TEST_INSTALL") == "0":
        pytest.skip("TAILOR_TEST_INSTALL=0")
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "TAILOR_BUILD_CUDA": "0"}
    subprocess.run([*command, "-w", str(out), str(copy)], check=True, env=environment)
    return next(out.glob("*.whl"))


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    script = SMOKE.format(folder=str(site))
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "works", result.stderr


def test_the_wheel_holds_the_kernels_and_the_assets_but_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("kernels/channel_stats.py", "assets/recipes/demo.yaml", "ops/_op.py"):
        assert f"tailor_engine/{expected}" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "csrc/"))]


def test_the_installed_package_works_from_another_folder(tmp_path):
    """The environment that runs these tests has the package installed, editable or not."""
    script = SMOKE.format(folder="tailor_engine")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "works", result.stderr


def test_no_compiler_is_one_clear_line(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "TAILOR_BUILD_CUDA": "0"}
    environment.pop("CXX", None)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    result = subprocess.run(
        [*command, "--build-temp", str(tmp_path / "tmp")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("tailor_engine needs a C++17 compiler")
