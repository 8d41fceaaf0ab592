"""One row for each op and shape, from the declarations: checked, then timed beside its peers."""

import fnmatch
import functools
import itertools
import math
from dataclasses import dataclass, field

import torch

from tailor_engine import ops
from tailor_engine.errors import TailorError, UserError
from tailor_engine.ops import OPS, _accuracy
from tailor_engine.ops._memory import use_large_pages

from . import levels, table
from .ceilings import Ceilings
from .peers import Peer, copied, names, peers, size, untimed
from .timing import interleaved

COLD_BYTES = 192 << 20
MOST_COPIES = 4096  # of shapes so small that Python's own overhead is what is measured


@dataclass
class Row:
    """One op on one shape: what is printed, and the fields of a results file."""

    op: str
    backend: str
    level: str
    threads: int
    shape: str
    dtype: str
    us: float
    spread: float
    operations: float
    moved: float
    limit: str
    percent_of_limit: float
    peers: dict[str, float]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self):
        """Return (unit, 1e9 operations a second): integer products count as one operation."""
        if OPS[self.op].arithmetic.startswith("int"):
            return "gmacs", self.operations / 2 / self.us / 1e3
        return "gflops", self.operations / self.us / 1e3

    @property
    def gbps(self):
        return self.moved / self.us / 1e3

    def as_dict(self):
        """Return the fields of a results file."""
        unit, rate = self.rate
        kept = {k: v for k, v in vars(self).items() if k not in ("operations", "moved")}
        return kept | {unit: rate, "gbps": self.gbps}


@dataclass(frozen=True)
class Choice:
    """What a run measures."""

    ops: tuple[str, ...] = ()
    backend: str | None = None
    peers: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    quick: bool = False

    def __post_init__(self):
        known = names(self.ops or OPS)
        for pattern in self.peers:
            if not fnmatch.filter(known, pattern):
                raise UserError(f"unknown peer {pattern!r}; the peers are {', '.join(known)}")

    def wants_peer(self, name):
        return not self.peers or any(fnmatch.fnmatchcase(name, p) for p in self.peers)

    def wants_shape(self, label):
        return not self.shapes or any(
            label == p or fnmatch.fnmatchcase(label, p) for p in self.shapes
        )


def cases(choice, note=lambda line: None):
    """Yield (op, backend, label, arguments) of all that was chosen, each built when asked for."""
    seen, found = [], False
    for name in choice.ops or sorted(OPS):
        op = OPS[name]
        reason = choice.backend and op.missing(choice.backend)
        if reason:
            note(f"{name}: {choice.backend}: {reason}")
            continue
        for label, arguments in op.benchmarks():
            seen.append(table.label(label, dtype_of(arguments)))
            if not choice.wants_shape(label) and not choice.wants_shape(seen[-1]):
                continue
            found = True
            reason = untimed(name, _accuracy.input_dtype(arguments))
            if reason:
                note(f"{name} {seen[-1]}: {reason}")
            else:
                yield op, choice.backend or op.choose(), label, arguments
    if choice.shapes and not found:
        shapes = ", ".join(dict.fromkeys(seen)) or "none"
        raise UserError(f"no shape is {' or '.join(choice.shapes)}; the shapes are {shapes}")


def dtype_of(arguments):
    """Return the name of the dtype that a row is known by: its first floating tensor's."""
    return str(_accuracy.input_dtype(arguments)).removeprefix("torch.")


def run(choice, ceilings: Ceilings, note=lambda line: None):
    """Yield a Row for every op and shape of a choice."""
    for op, backend, label, arguments in cases(choice, note):
        yield measure(op, backend, label, arguments, choice, ceilings)


def measure(op, backend, label, arguments, choice, ceilings):
    """Time one op on one shape beside its peers, after a check against float64."""
    calls, skipped = calls_of(op, backend, label, arguments, choice)
    with torch.no_grad(), ops.backend(backend):
        seconds, least = (0.08, 3) if choice.quick else (0.35, 5)
        times = interleaved(calls, seconds, least, first=warming(op, arguments, calls))
    us, spread = times.pop("ours")
    moved, operations = op.cost(*arguments)
    threads, dtype = torch.get_num_threads(), _accuracy.input_dtype(arguments)
    limit, seconds = ceilings.limit(op, dtype, moved, operations, threads)
    return Row(
        op=op.name,
        backend=backend,
        level=ceilings.level,
        threads=threads,
        shape=label,
        dtype=dtype_of(arguments),
        us=us,
        spread=spread,
        operations=operations,
        moved=moved,
        limit=limit,
        percent_of_limit=100 * 1e6 * seconds / us,
        peers={name: median for name, (median, _) in times.items()},
        skipped=skipped,
    )


def calls_of(op, backend, label, arguments, choice):
    """Return ({"ours" or peer: call}, {peer: why it is not timed}); refuse a wrong answer."""
    try:
        _accuracy.check(op, op.on(backend), arguments)
    except AssertionError as error:
        raise TailorError(f"{op.name} {label} on {backend} is wrong, not timed: {error}") from None
    rivals = {n: p for n, p in peers(op.name, arguments).items() if choice.wants_peer(n)}
    skipped = {name: peer.skipped for name, peer in rivals.items() if peer.skipped}
    timed = {"ours": Peer(lambda: functools.partial(op, *copied(arguments)), size(arguments))}
    timed |= {name: peer for name, peer in rivals.items() if not peer.skipped}
    with torch.no_grad(), ops.backend(backend):
        return rotating(timed, large_pages=op.arithmetic.startswith("int")), skipped


def warming(op, arguments, calls):
    """Return {name: a tiny call of the same code}, for the moment before each timed one.

    Data comes from memory in real use; code does not, for an op is called layer after layer. After
    200 MB of its peers' data a call spends up to 90 us on Python's and the dispatcher's own lines.
    """
    dtype, tiny = _accuracy.input_dtype(arguments), list(op.cases())
    case = next((case for case in tiny if _accuracy.input_dtype(case) == dtype), tiny[0])
    made = {"ours": functools.partial(op, *copied(case))}
    return made | {n: p.make() for n, p in peers(op.name, case).items() if n in calls}


def rotating(timed, large_pages=False):
    """Return {name: call}, each on the next of its own buffers at every call.

    Weights and activations come from memory in real use, so what all of them touch in turn before
    one comes back fills more than the last-level cache. `large_pages`: the weights lie as those of
    a loaded network do.
    """
    cold = max(COLD_BYTES, 4 * levels.cache_bytes())
    touched = sum(peer.nbytes for peer in timed.values())
    count = min(MOST_COPIES, math.ceil(cold / max(touched, 1)))
    made = {name: [peer.make() for _ in range(count)] for name, peer in timed.items()}
    if large_pages:
        arguments = itertools.chain.from_iterable(
            getattr(call, "args", ()) for call in itertools.chain(*made.values())
        )
        use_large_pages(value for value in arguments if isinstance(value, torch.Tensor))
    return {name: _turn(calls) for name, calls in made.items()}


def _turn(functions):
    turn = itertools.cycle(functions)
    return lambda: next(turn)()
