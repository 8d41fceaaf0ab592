"""`python -m tailor_engine.cli`, for launchers that want a module (torchrun, accelerate)."""

import sys

from tailor_engine.cli import main

sys.exit(main())
