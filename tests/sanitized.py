"""A pytest plugin (`-p tests.sanitized`): the package runs the kernels of build/sanitized.

Their module stands before the installed one on the package's search path; it needs the sanitizer's
runtime in LD_PRELOAD, which `make sanitize` sets.
"""

from pathlib import Path

import tailor_engine

FOLDER = Path(__file__).parents[1] / "build/sanitized/tailor_engine"
tailor_engine.__path__.insert(0, str(FOLDER))

from tailor_engine import _cpu  # noqa: E402  (only after the path is set)

if Path(_cpu.__file__).parent != FOLDER:
    raise RuntimeError(f"the sanitized kernels are not in {FOLDER}: run make sanitize")
