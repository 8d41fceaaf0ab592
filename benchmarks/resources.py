"""`python -m benchmarks.resources`: what each CUDA kernel takes of a multiprocessor.

Read from the machine code of the built module, for every GPU that it holds; no GPU is needed.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

from tailor_engine.errors import UserError

from .results import FOLDER


def tool(name):
    """Return the path of one of CUDA's tools: on the PATH, in CUDA_HOME, or beside Triton."""
    places = [None, "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = next((path for path in (shutil.which(name, path=p) for p in places) if path), None)
    if found is None:
        raise UserError(f"{name} was not found on the PATH, in /usr/local/cuda or in triton")
    return found


def module():
    """Return the path of the built CUDA module."""
    spec = importlib.util.find_spec("tailor_engine._cuda")
    if spec is None:
        raise UserError("the CUDA extension is not built (nvcc was not found at install time)")
    return spec.origin


def table(path):
    """Return a row for each kernel and GPU: registers, stack, local and shared bytes."""
    command = [tool("cuobjdump"), "--dump-resource-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout
    rows, gpu = [], ""
    for line in text.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            gpu = found[1]
        elif found := re.search(r"Function (.*):$", line):
            kernel = found[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            rows.append(
                {
                    "gpu": gpu,
                    "kernel": short(kernel),
                    "registers": used["REG"],
                    "stack_bytes": used["STACK"],
                    "local_bytes": used["LOCAL"],
                    "static_shared_bytes": used["SHARED"],
                }
            )
    return sorted(rows, key=lambda row: (row["gpu"], row["kernel"]))


def short(signature):
    """Return a kernel's name and template arguments alone."""
    name = re.sub(r"\(anonymous namespace\)::|tailor::|^void ", "", signature)
    return re.sub(r"\((int|bool)\)", "", name[: re.search(r">\(|\w\(", name).start() + 1])


def compiler():
    """Return the version of nvcc that stands on this machine."""
    text = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def main():
    """Write the table of today, and print it."""
    rows = table(module())
    path = FOLDER / f"resources-{time.strftime('%Y-%m-%d')}.json"
    stamp = json.dumps({"date": time.strftime("%Y-%m-%d"), "nvcc": compiler()})
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"stamp": {stamp}, "kernels": [\n{lines}\n]}}\n')
    for row in rows:
        spilled = row["stack_bytes"] + row["local_bytes"]
        print(f"{row['gpu']:7} {row['registers']:4} registers {spilled:4} spilled  {row['kernel']}")


if __name__ == "__main__":
    main()
