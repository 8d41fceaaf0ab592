"""What people use today for each op: the rivals that are timed in the same run."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tailor_engine.ops import OPS

from .levels import peers_have


@dataclass(frozen=True)
class Peer:
    """One rival on one shape; `make()` gives a call on buffers of its own, to be rotated."""

    make: Callable[[], Callable[[], object]]
    nbytes: float
    """Bytes of those buffers, which decide how many of them it takes to leave every cache."""
    skipped: str = ""
    """Why this machine and level do not time it; empty: they do."""


def peers(name, arguments):
    """Return {name: Peer} for one op on one shape; nothing is allocated before `make()`."""
    if name in _PEERS:
        return _PEERS[name](*arguments)
    # The declaration's own expression in plain torch: statistics and quantizers.
    return {"torch": _peer(OPS[name].reference, *arguments)}


def untimed(name, dtype):
    """Say why a shape is not timed at all; empty: it is."""
    if name in ("linear_kl", "linear_kl_topk") and dtype == torch.bfloat16:
        # The op's own products are torch's: 90 s and more a call at AVX2.
        return _unless("avx512f") and "torch's bf16 products take minutes without AVX-512"
    return ""


def names(ops):
    """Return the names of all peers of some ops; found on tiny cases, for nothing is made yet."""
    found = {}
    for name in ops:
        found |= dict.fromkeys(peers(name, next(iter(OPS[name].cases()))))
    return list(found)


def copied(arguments):
    """Return the arguments with tensors of their own."""
    if isinstance(arguments, torch.Tensor):
        return arguments.detach().clone()
    if isinstance(arguments, (list, tuple)):
        return [copied(item) for item in arguments]
    return arguments


def size(value):
    """Return the bytes of every tensor in a value."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0


def _peer(function, *arguments):
    """Return a Peer that calls a function on copies of its arguments."""
    return Peer(lambda: functools.partial(function, *copied(arguments)), size(arguments))


def _fastest(functions, *arguments):
    """Return a Peer that calls whichever of several expressions is the fastest here."""

    @functools.cache
    def chosen():
        return min(functions, key=lambda f: _seconds(functools.partial(f, *copied(arguments))))

    return Peer(lambda: functools.partial(chosen(), *copied(arguments)), size(arguments))


def _seconds(call):
    """Return the time of one call, of the second where the first touch is a good part of it."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds > 0.2:
            break
    return seconds


def _channel_stats(x, mask, stats):
    """The declaration's sums, and the same as products with ones: 2.4 times faster when wide."""

    def by_products(x, mask, stats):
        x = x.float() if mask is None else torch.where(mask[:, None], x, 0).float()
        ones = x.new_ones(1, x.shape[0])
        sizes = x.abs()
        stats[0] += x.shape[0] if mask is None else mask.sum()
        stats[1] += (ones @ x)[0]
        stats[3] += (ones @ sizes)[0]
        if x.shape[0]:
            torch.maximum(stats[4], sizes.amax(0), out=stats[4])
        stats[2] += (ones @ sizes.square_())[0]

    return {"torch": _fastest((OPS["channel_stats"].reference, by_products), x, mask, stats)}


def _block_influence(x, y, mask, totals):
    """The declaration's sums, and the same as batched products: 5 times faster when wide."""

    def by_products(x, y, mask, totals):
        x, y = (t if mask is None else torch.where(mask[:, None], t, 0) for t in (x, y))
        x, y = x.float(), y.float()
        norm_x, norm_y = (torch.bmm(t[:, None], t[:, :, None]).view(-1).sqrt() for t in (x, y))
        cosine = torch.bmm(x[:, None], y[:, :, None]).view(-1) / (norm_x * norm_y)
        rows = torch.stack((cosine, norm_x, norm_y))
        totals[0] += x.shape[0] if mask is None else mask.sum()
        totals[1:] += rows.sum(1, dtype=torch.float64)
        return rows

    functions = OPS["block_influence"].reference, by_products
    return {"torch": _fastest(functions, x, y, mask, totals)}


def _linear(x, features):
    """Products of the same shape: full precision, and torch's own dynamic int8."""
    width = x.shape[-1]
    values = features * width

    @functools.cache
    def weight(dtype):
        return torch.randn(features, width).to(dtype)

    def dense(dtype):
        return functools.partial(functional.linear, x.to(dtype), weight(dtype).clone())

    def dynamic():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao points to torchao, slower on a CPU
            layer = torch.ao.nn.quantized.dynamic.Linear(width, features, bias_=False)
        return functools.partial(layer, x)

    return {
        "torch fp32": Peer(lambda: dense(torch.float32), 4 * values),
        "torch bf16": Peer(lambda: dense(torch.bfloat16), 2 * values, _unless("avx512f")),
        "torch dynamic int8": Peer(dynamic, values),
    }


def _int8_linear(x, data, scale, *rest):
    """The peers of every linear layer, and the bare integer product: int8 x int8 -> int32."""
    features, width = scale.shape[0], x.shape[-1]

    @functools.cache
    def operands():
        codes = torch.randint(-127, 128, (x.numel() // width, width), dtype=torch.int8)
        return codes, torch.randint(-127, 128, (width, features), dtype=torch.int8)

    def product():
        return functools.partial(torch._int_mm, *copied(operands()))

    skipped = _unless("avx512_vnni", "amx_int8")
    return _linear(x, features) | {"torch._int_mm": Peer(product, features * width, skipped)}


def _unless(*features):
    """Return why a low-precision product is not timed, unless the peers have one of these."""
    if any(map(peers_have, features)):
        return ""
    return f"5 to 90 times slower than fp32 without {' or '.join(features)}"


def _int4_linear(x, data, scale, *rest):
    return _linear(x, scale.shape[0])


def _gram(x, mask, out):
    def product(x, out):
        return out.addmm_(x.T, x) if x.dtype == out.dtype else out.add_(x.T @ x)

    skipped = _unless("avx512f") if x.dtype == torch.bfloat16 else ""
    return {"torch X.T @ X": dataclasses.replace(_peer(product, x, out), skipped=skipped)}


def _structured_slice(weights, rows, columns):
    kept = OPS["structured_slice"].reference(weights, rows, columns)
    return {
        "torch index_select": _peer(OPS["structured_slice"].reference, weights, rows, columns),
        "memcpy": _peer(lambda *parts: [part.clone() for part in parts], *kept),
    }


def _linear_kl(student, head, teacher, teacher_head, labels, mask, divergence, temperature, *rest):
    """The plain loss under autograd, the same in checkpointed chunks, and the products alone."""
    wanted = rest[-2:]

    def divergence_of(states, weight, teacher_states, teacher_weight):
        log_p = _log_probabilities(states, weight, temperature)
        log_q = _log_probabilities(teacher_states, teacher_weight, temperature)
        return functional.kl_div(log_p, log_q, log_target=True, reduction="sum")

    def chunked(states, weight, teacher_states, teacher_weight):
        parts = zip(states.split(CHUNK), teacher_states.split(CHUNK), strict=True)
        return sum(
            checkpoint(divergence_of, s, weight, t, teacher_weight, use_reentrant=False)
            for s, t in parts
        )

    inputs = student, head, teacher, teacher_head
    return {
        "torch": _peer(_with_gradients(divergence_of, wanted), *inputs),
        "torch, checkpointed chunks": _peer(_with_gradients(chunked, wanted), *inputs),
        "its four products": _products((student, head), (teacher, teacher_head), wanted),
    }


def _linear_kl_topk(student, head, ids, log_probabilities, labels, mask, temperature, *rest):
    """The plain loss over the listed ids and the tail, and the products alone."""
    wanted = rest[-2:]

    def divergence_of(states, weight, ids, log_q):
        log_p = _log_probabilities(states, weight, temperature).gather(1, ids)
        tail_p, tail_q = (torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-6)) for x in (log_p, log_q))
        listed = functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
        return listed + functional.kl_div(tail_p, tail_q, log_target=True, reduction="sum")

    inputs = student, head, ids, log_probabilities
    return {
        "torch": _peer(_with_gradients(divergence_of, wanted), *inputs),
        "its three products": _products((student, head), None, wanted),
    }


CHUNK = 128  # rows of a checkpointed chunk: what trainers use, so that the logits fit


def _log_probabilities(states, weight, temperature):
    return functional.log_softmax(states @ weight.T / temperature, -1, dtype=torch.float32)


def _with_gradients(loss, wanted):
    """Return a loss and its backward as one call; the first two arguments take gradients."""

    @torch.enable_grad()
    def call(states, weight, *rest):
        leaves = (states, weight)
        for leaf, needed in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(needed).grad = None
        loss(states, weight, *rest).div(states.shape[0]).backward()

    return call


def _products(student, teacher, wanted):
    """Return the Peer of a loss's products alone, in the chunk of rows that is fastest here."""
    rows = student[0].shape[0]
    chunks = sorted({min(rows, chunk) for chunk in (128, 512, rows)})
    calls = [functools.partial(_products_in_chunks, max(1, c), wanted) for c in chunks]
    return _fastest(calls, student, teacher)


def _products_in_chunks(chunk, wanted, student, teacher):
    (states, weight), (to_states, to_weight) = student, wanted
    gradient = torch.zeros_like(weight) if to_weight else None
    for begin in range(0, states.shape[0], chunk):
        part = slice(begin, begin + chunk)
        logits = states[part] @ weight.T
        if teacher is not None:
            teacher[0][part] @ teacher[1].T
        if to_states:
            logits @ weight
        if gradient is not None:
            gradient.addmm_(logits.T, states[part])


_PEERS = {
    "block_influence": _block_influence,
    "channel_stats": _channel_stats,
    "gram": _gram,
    "int4_linear": _int4_linear,
    "int8_linear": _int8_linear,
    "linear_kl": _linear_kl,
    "linear_kl_topk": _linear_kl_topk,
    "structured_slice": _structured_slice,
}
