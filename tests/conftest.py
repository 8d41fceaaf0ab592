"""What all tests share."""

import os

# Everything here runs without a network; a test that needs a hub model would be a mistake.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
