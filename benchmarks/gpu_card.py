"""The card that is measured, behind one small interface; a rehearsal on the CPU has the same one.

All that asks CUDA for something stands here: what it is, clocks, graphs and memory.
"""

import functools
import statistics
import time

import torch

MILLISECONDS = 1.0  # that one timed stretch lasts at least: events resolve half a microsecond
MOST_CALLS = 2000  # of one stretch, which is one graph


class Card:
    """The current CUDA device."""

    device = torch.device("cuda")
    rehearsed = False

    def describe(self):
        """Return what a results file says of the card and of what drove it."""
        import triton

        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": self.cache_bytes(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def cache_bytes(self):
        """Return the size of the second-level cache."""
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20)

    def free_bytes(self):
        """Return the bytes that can still be had."""
        return torch.cuda.mem_get_info()[0]

    def synchronize(self):
        """Wait for all work; where a kernel has failed, this raises."""
        torch.cuda.synchronize()

    def event(self):
        """Return a mark for the stream: record() it, ask a later one for elapsed_time()."""
        return torch.cuda.Event(enable_timing=True)

    def capture(self, function):
        """Return (replay, what the function returned) after one run outside and one recorded."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries make their handles and workspaces here
            function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result

    def peak_bytes(self, function):
        """Return (result, bytes above what was held before) of a call."""
        self.release()
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), function()
        self.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def release(self):
        """Give back what no tensor holds any longer."""
        self.synchronize()
        torch.cuda.empty_cache()

    def size(self, full, rehearsed=1):
        """Return a size as it is measured; `rehearsed` is the least one of a rehearsal."""
        return full


class Rehearsal(Card):
    """The CPU in a card's place: every step at tiny sizes, with Triton's interpreter.

    It shows that the script runs; its times say nothing.
    """

    device = torch.device("cpu")
    rehearsed = True

    def describe(self):
        """Return what a results file says of it."""
        return {"name": "rehearsal", "torch": torch.__version__}

    def cache_bytes(self):
        """Return no cache: two copies of everything are enough."""
        return 0

    def free_bytes(self):
        """Return as much as any tiny size takes."""
        return 1 << 30

    def synchronize(self):
        """Wait for nothing."""

    def event(self):
        """Return a mark on the host's clock."""
        return _HostEvent()

    def capture(self, function):
        """Return a replay that calls the function again, and fills in what it returned."""
        result = function()

        def replay():
            _copy_into(result, function())

        return replay, result

    def peak_bytes(self, function):
        """Return (result, 0): memory is not what a rehearsal measures."""
        return function(), 0

    def release(self):
        """Hold nothing."""

    def size(self, full, rehearsed=1):
        """Return a 256th of a size."""
        return max(rehearsed, full // 256)


class _HostEvent:
    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def _copy_into(old, new):
    """Write results over earlier ones, as a graph's replay does."""
    if isinstance(old, torch.Tensor):
        old.copy_(new)
    elif isinstance(old, (list, tuple)):
        for one, other in zip(old, new, strict=True):
            _copy_into(one, other)


def stretch(card, calls, estimate_us, unrecorded=""):
    """Return (replay, calls in it, why it is no graph) of a stretch of calls, in turn.

    Each call keeps its own output until its next turn, so that no two in a row write to one place.
    """
    outputs = [None] * len(calls)

    def run(loops):
        for _ in range(loops):
            for place, call in enumerate(calls):
                outputs[place] = call()

    for last in (False, True):
        loops = _loops(card, estimate_us * len(calls), len(calls))
        record = functools.partial(run, loops)
        if unrecorded:
            return record, loops * len(calls), unrecorded
        try:
            replay, _ = card.capture(record)
            card.synchronize()
        except Exception as error:  # a rival that asks the device for a value, say
            card.synchronize()
            return record, loops * len(calls), f"{type(error).__name__}: {error}".splitlines()[0]
        took = once(card, replay)
        if last or _loops(card, took / loops, len(calls)) < 2 * loops:
            return replay, loops * len(calls), ""
        estimate_us = took / loops / len(calls)  # the first one was mostly the call's own start


def _loops(card, turn_us, calls):
    """Return how many turns of all calls fill a stretch."""
    if card.rehearsed:
        return 1
    return max(1, min(round(1000 * MILLISECONDS / max(turn_us, 1e-3)), MOST_CALLS // calls))


def interleaved(card, stretches, seconds, least=7, most=400):
    """Time stretches in turn; return {name: (median microseconds a call, spread)}.

    stretches: {name: (replay, calls)}. Spread: interquartile range over median.
    """
    for replay, _ in stretches.values():
        replay()
    card.synchronize()
    samples = {name: [] for name in stretches}
    end, least = time.perf_counter() + seconds * len(stretches), 2 if card.rehearsed else least
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        marks = {}
        next(iter(stretches.values()))[0]()  # the first to be timed must not wait for its start
        for name, (replay, _) in stretches.items():
            marks[name] = card.event(), card.event()
            marks[name][0].record()
            replay()
            marks[name][1].record()
        card.synchronize()
        for name, (start, stop) in marks.items():
            samples[name].append(1000 * start.elapsed_time(stop) / stretches[name][1])
        rounds += 1
    return {name: _summary(times) for name, times in samples.items()}


def once(card, call):
    """Return the microseconds of one warm call: what a stretch's length is chosen by."""
    call()
    start, stop = card.event(), card.event()
    card.synchronize()
    start.record()
    call()
    stop.record()
    card.synchronize()
    return 1000 * start.elapsed_time(stop)


def _summary(times):
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median if median else 0.0


def ceilings(card, seconds=1.0):
    """Return {what: rate}: copy in GB/s (read and written), products in TFLOP/s (TOP/s).

    Random values: products of zeros run faster than any real ones, for they draw less power.
    """
    rates = {"copy": 0.0}
    for size in (256 << 20, 1 << 30):
        source = torch.randint(256, (card.size(size),), dtype=torch.uint8, device=card.device)
        target = torch.empty_like(source)
        us = _best(card, lambda t=target, s=source: t.copy_(s), seconds / 2)
        rates["copy"] = max(rates["copy"], 2 * source.numel() / us / 1e3)
    for name, n, product in (
        ("bfloat16", 8192, _product(torch.bfloat16)),
        ("float32", 4096, _product(torch.float32)),
        ("torch._int_mm", 8192, _integer_product),
    ):
        try:
            rates[name] = 2 * card.size(n) ** 3 / _best(card, product(card, n), seconds) / 1e6
        except RuntimeError:  # torch._int_mm, where a card or a build has none
            rates[name] = 0.0
    # The tensor cores' own ratio: torch's integer product may be an old and slow one.
    rates["int8"] = max(2 * rates["bfloat16"], rates["torch._int_mm"])
    return rates


def _product(dtype):
    def make(card, n):
        a, b = torch.randn(2, card.size(n), card.size(n), device=card.device).to(dtype)
        return lambda: a @ b

    return make


def _integer_product(card, n):
    size = card.size(n)
    a, b = torch.randint(-127, 128, (2, size, size), device=card.device).to(torch.int8)
    return lambda: torch._int_mm(a, b.t())


def _best(card, call, seconds):
    """Return the median microseconds of a call."""
    replay, count, _ = stretch(card, [call], once(card, call))
    return interleaved(card, {"": (replay, count)}, seconds)[""][0]
