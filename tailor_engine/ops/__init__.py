"""The ops, each declared in one file; the name of the file is the name everywhere."""

from tailor_engine.ops._op import BACKENDS, OPS, Op, backend, unavailable
from tailor_engine.ops.channel_stats import channel_stats

__all__ = [
    "BACKENDS",
    "OPS",
    "Op",
    "backend",
    "channel_stats",
    "unavailable",
]
