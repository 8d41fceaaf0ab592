"""The one accuracy rule: no worse than twice plain torch in the same dtype; no tolerance tables.

Tests hold every backend to it, and benchmarks whatever they time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from tailor_engine.ops._op import Op


def double(value: Any) -> Any:
    """Return an argument with every floating tensor and dtype in float64."""
    if isinstance(value, (list, tuple)):
        return type(value)(double(item) for item in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def run(
    function: Callable[..., Any], arguments: Iterable[Any], written: Iterable[int]
) -> list[Any]:
    """Call a function on private copies; return its outputs and the arguments that it writes."""
    # deepcopy keeps strides, which `clone` of a list would not reach.
    arguments = [copy.deepcopy(a) for a in arguments]
    with torch.no_grad():
        result = function(*arguments)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    return [o for o in outputs if o is not None] + [arguments[i] for i in written]


def written_positions(name: str) -> list[int]:
    """Return the positions of the arguments that an op's schema marks as written."""
    schema = getattr(torch.ops.tailor_engine, name).default._schema
    return [
        i
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def input_dtype(arguments: Iterable[Any]) -> torch.dtype:
    """Return the dtype of the first floating tensor: the precision that the caller chose."""
    for value in arguments:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                return item.dtype
    return torch.float32


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest error, each relative to the largest value of its row of the truth."""
    if truth.numel() == 0:
        return 0.0
    finite = torch.isfinite(truth)
    _require(
        torch.equal(torch.isfinite(result), finite), "not finite where the truth is, or vice versa"
    )
    result, truth = (torch.where(finite, t.double(), 0) for t in (result, truth))
    row = truth.abs() if truth.dim() == 0 else truth.abs().amax(-1, keepdim=True)
    return ((result - truth).abs() / row.clamp_min(1e-30)).max().item()


def errors(
    op: Op, function: Callable[..., Any], arguments: Sequence[Any]
) -> list[tuple[float, float]]:
    """Return (error, error of plain torch in the same dtype) of each output on one case.

    Both are 0 where equality is what is asked for: of exact ops and of integers.

    Raises: AssertionError where shapes, dtypes, integers or what is finite differ.
    """
    written = written_positions(op.name)
    results = run(function, arguments, written)
    plain = run(op.reference, arguments, written)
    _require(len(results) == len(plain), f"{len(results)} outputs, expected {len(plain)}")
    for number, (result, expected) in enumerate(zip(results, plain, strict=True)):
        same = (result.shape, result.dtype) == (expected.shape, expected.dtype)
        _require(same, f"output {number}: another shape or dtype than the reference")
        if op.exact or not result.is_floating_point():
            _require(torch.equal(result, expected), f"output {number}: differs from the reference")
    if op.exact:
        return [(0.0, 0.0)] * len(results)
    truths = run(op.reference, [double(a) for a in arguments], written)
    return [
        (relative_error(result, truth), relative_error(expected, truth))
        if result.is_floating_point()
        else (0.0, 0.0)
        for result, expected, truth in zip(results, plain, truths, strict=True)
    ]


def check(
    op: Op, function: Callable[..., Any], arguments: Sequence[Any], *more: Sequence[Any]
) -> None:
    """Hold one implementation of an op to the rule on one case.

    `more` holds other draws of the same case: the rule then compares the largest error of all
    draws with plain torch's largest, for a single number can be right to its last bit by luck.

    Raises: AssertionError with the error and what was allowed.
    """
    draws = [errors(op, function, each) for each in (arguments, *more)]
    epsilon = torch.finfo(input_dtype(arguments)).eps
    for number, pairs in enumerate(zip(*draws, strict=True)):
        error, bound = (max(each) for each in zip(*pairs, strict=True))
        _require(
            error <= op.factor * bound + epsilon,
            f"output {number}: error {error:.3g}, plain torch {bound:.3g}, eps {epsilon:.3g}",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
