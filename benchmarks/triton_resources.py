"""Record what every compiled Triton kernel takes of a card: no GPU is needed.

One line a kernel and configuration: registers and spilled bytes from the machine code, shared
memory, and the instructions that tell its path (wgmma, cp.async, 16-byte accesses).

    python -m benchmarks.triton_resources
"""

import json
import subprocess
import sys

import triton

from .results import FOLDER
from .timing import today


def compiled(capability: int) -> list[dict]:
    """Return one record for every kernel that ``tests.triton_compile`` compiles for a card."""
    command = [sys.executable, "-m", "tests.triton_compile", str(capability), "all"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def main() -> None:
    """Compile for sm_80 and sm_90 and write the table."""
    records = [record for capability in (80, 90) for record in compiled(capability)]
    lines = (json.dumps({"triton": triton.__version__, **record}) for record in records)
    path = FOLDER / f"triton-resources-{today()}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
