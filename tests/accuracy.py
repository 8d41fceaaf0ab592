"""The one accuracy rule: no worse than twice plain torch in the same dtype; no tolerance tables."""

import copy

import torch


def double(value):
    """Return an argument with every floating tensor and dtype in float64."""
    if isinstance(value, (list, tuple)):
        return type(value)(double(item) for item in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def run(function, arguments, written):
    """Call a function on private copies; return its outputs and the arguments that it writes."""
    # deepcopy keeps strides, which `clone` of a list would not reach.
    arguments = [copy.deepcopy(a) for a in arguments]
    with torch.no_grad():
        result = function(*arguments)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    return [o for o in outputs if o is not None] + [arguments[i] for i in written]


def written_positions(name):
    """Return the positions of the arguments that an op's schema marks as written."""
    schema = getattr(torch.ops.tailor_engine, name).default._schema
    return [
        i
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def input_dtype(arguments):
    """Return the dtype of the first floating tensor: the precision that the caller chose."""
    for value in arguments:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                return item.dtype
    return torch.float32


def relative_error(result, truth):
    """Return the largest error, each relative to the largest value of its row of the truth."""
    if truth.numel() == 0:
        return 0.0
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(result), finite), "not finite in other places than the truth"
    result, truth = (torch.where(finite, t.double(), 0) for t in (result, truth))
    row = truth.abs() if truth.dim() == 0 else truth.abs().amax(-1, keepdim=True)
    return ((result - truth).abs() / row.clamp_min(1e-30)).max().item()


def check(op, function, arguments):
    """Hold one implementation of an op to the rule on one case."""
    written = written_positions(op.name)
    results = run(function, arguments, written)
    plain = run(op.reference, arguments, written)
    assert len(results) == len(plain)
    for result, expected in zip(results, plain, strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if op.exact:
        for result, expected in zip(results, plain, strict=True):
            assert torch.equal(result, expected)
        return
    truths = run(op.reference, [double(a) for a in arguments], written)
    epsilon = torch.finfo(input_dtype(arguments)).eps
    for number, (result, expected, truth) in enumerate(zip(results, plain, truths, strict=True)):
        if not result.is_floating_point():
            assert torch.equal(result, expected), f"output {number}"
            continue
        error, bound = relative_error(result, truth), relative_error(expected, truth)
        assert error <= op.factor * bound + epsilon, (
            f"output {number}: error {error:.3g}, plain torch {bound:.3g}, eps {epsilon:.3g}"
        )
