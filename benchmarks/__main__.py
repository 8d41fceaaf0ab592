"""`python -m benchmarks`: the same as `tailor bench`."""

import sys

from tailor_engine.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
