"""Time implementations side by side, and say on what machine."""

import datetime
import functools
import platform
import statistics
import time

import torch

from . import levels


def interleaved(functions, seconds=0.5, least=5, most=1000, first=None):
    """Time several functions in turn, so that a busy moment of the machine hits all of them.

    `first`: {name: what runs untimed before each call}. Returns {name: (median microseconds,
    spread)}; spread: interquartile range over median.
    """
    first = first or {}
    for function in functions.values():
        function()  # first touch, caches, dispatch
    samples = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while True:
        for name, function in functions.items():
            first.get(name, _nothing)()
            start = time.perf_counter()
            function()
            samples[name].append(1e6 * (time.perf_counter() - start))
        count = len(next(iter(samples.values())))
        if count >= most or (count >= least and time.perf_counter() > end):
            break
    return {name: summary(times) for name, times in samples.items()}


def _nothing():
    pass


def summary(times):
    """Return the median and the interquartile range relative to it."""
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


@functools.cache
def overhead():
    """Return what every time holds beside the kernel, in us: the timer, and an op's call.

    The call: torch's dispatcher and the op's checks, measured on one value.
    """
    from tailor_engine.ops import channel_stats

    one, stats = torch.ones(1, 1), torch.zeros(5, 1)
    with torch.no_grad():
        calls = {"timer_us": lambda: None, "call_us": lambda: channel_stats(one, None, stats)}
        return {name: us for name, (us, _) in interleaved(calls, 0.05).items()}


def machine():
    """Describe this machine: processor, its levels, threads, versions."""
    name, features = levels.processor()
    return {
        "processor": name,
        "levels": features,
        "held_to": levels.held_to(),  # the peers, where a lower level is timed
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def today():
    """Return the date as results files hold it."""
    return datetime.date.today().isoformat()
