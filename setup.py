"""Build the two native modules: `_cpu`, and `_cuda` where nvcc is found; neither needs torch.

TAILOR_BUILD_CPU=0 or TAILOR_BUILD_CUDA=0 leaves one out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

CUDA_TARGETS = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",  # PTX: newer cards compile it at load
)


def nvcc() -> str | None:
    """Return the path of nvcc, or None where CUDA is absent or switched off."""
    if os.environ.get("TAILOR_BUILD_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_libraries(compiler: str) -> list[str]:
    """Return the folders of the static CUDA runtime; nvcc itself says where it stands.

    The path of nvcc does not tell: it may be a link or a wrapper script somewhere else.
    """
    dry = [compiler, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    answer = subprocess.run(dry, capture_output=True, text=True, check=False).stderr
    top = next((line[7:].strip() for line in answer.splitlines() if line.startswith("#$ TOP=")), "")
    folders = (Path(top, name).resolve() for name in ("lib64", "lib", "targets/x86_64-linux/lib"))
    return list(dict.fromkeys(str(f) for f in folders if (f / "libcudart_static.a").exists()))


def sources(folder: str, suffix: str) -> list[str]:
    """Return the sources of one module, in a fixed order."""
    return sorted(str(p) for p in Path(folder).glob(f"*{suffix}"))


class Build(build_ext):
    """Compile .cu files with nvcc, and say in one line what is missing."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the .cu files of an extension first, then the rest as usual."""
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None and "CXX" not in os.environ:
            raise SystemExit(
                "tailor_engine needs a C++17 compiler: install g++ (apt install g++) or set CXX"
            )
        cuda = [s for s in ext.sources if s.endswith(".cu")]
        ext.sources = [s for s in ext.sources if not s.endswith(".cu")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for an nvcc of its own
            ext.extra_objects = [*ext.extra_objects, *pool.map(self.compile_cuda, cuda)]
        super().build_extension(ext)

    def compile_cuda(self, source: str) -> str:
        """Compile one .cu file to an object in the build folder."""
        target = Path(self.build_temp) / (Path(source).stem + ".cuda.o")
        needed = [Path(source), *Path("csrc/cuda").glob("*.cuh"), *Path("csrc/cuda").glob("*.h")]
        if target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in needed):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc() or "nvcc", "-c", source, "-o", str(target), "-O3", "-std=c++17"]
        # No -Werror: another compiler's new warning must not cost a user the kernels.
        flags = ["-Xcompiler=-fPIC,-Wall,-fvisibility=hidden"]
        if subprocess.run([*command, *flags, *CUDA_TARGETS], check=False).returncode:
            raise SystemExit(
                f"nvcc could not compile {source} (CUDA 12 or newer is needed); "
                "TAILOR_BUILD_CUDA=0 builds without it"
            )
        return str(target)


def extensions() -> list[Extension]:
    """Return the modules that this machine can build."""
    flags = ["-O3", "-fopenmp", "-Wall", "-fno-math-errno"]
    flags += [
        "-Wno-unknown-pragmas",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ]  # GCC 12's own
    link = ["-fopenmp"]  # dynamic: torch's libgomp and ours must be one
    if os.environ.get("TAILOR_SANITIZE") == "1":  # `make sanitize`
        checks = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
        flags += ["-O1", "-g1", "-fno-sanitize-recover=all", *checks]
        link += checks
    cpu = Pybind11Extension(
        "tailor_engine._cpu",
        sources("csrc/cpu", ".cpp"),
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=link,
        depends=sources("csrc/cpu", ".h"),
    )
    found = [] if os.environ.get("TAILOR_BUILD_CPU") == "0" else [cpu]
    compiler = nvcc()
    if compiler is None or not sources("csrc/cuda", ".cu"):
        return found
    cuda = Pybind11Extension(
        "tailor_engine._cuda",
        sources("csrc/cuda", ".cpp") + sources("csrc/cuda", ".cu"),
        cxx_std=17,
        libraries=["cudart_static", "rt", "dl", "pthread"],
        library_dirs=cuda_libraries(compiler),
        depends=sources("csrc/cuda", ".cuh") + sources("csrc/cuda", ".h"),
    )
    return [*found, cuda]


PACKAGES = [
    "tailor_engine",
    "tailor_engine.assets",
    "tailor_engine.cli",
    "tailor_engine.decode",
    "tailor_engine.diagnostics",
    "tailor_engine.families",
    "tailor_engine.io",
    "tailor_engine.ops",
    "tailor_engine.stages",
    "tailor_engine.stages.prune",
    "tailor_engine.stages.quantize",
    "tailor_engine.stages._vocabulary",
    "tailor_engine.kernels",
]

if __name__ == "__main__":
    with ParallelCompile(default=2):
        setup(
            packages=PACKAGES,
            # The Triton kernels stand in a top-level folder of their own, without __init__.py: a
            # top-level package `kernels` would shadow the PyPI package that transformers looks for.
            package_dir={"tailor_engine.kernels": "kernels/triton"},
            package_data={"tailor_engine.assets": ["*", "recipes/*"]},
            ext_modules=extensions(),
            cmdclass={"build_ext": Build},
        )
