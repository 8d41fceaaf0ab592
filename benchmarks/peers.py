"""What people use today for each op: the rivals that are timed in the same run."""

import warnings

import torch
from torch.nn import functional

from tailor_engine.ops import OPS


def peers(name, arguments):
    """Return {peer: function of no arguments} for one op on one shape."""
    special = {
        "int8_linear": _linear_peers,
        "int4_linear": _linear_peers,
        "linear_kl": _distillation_peers,
        "gram": _gram_peers,
    }
    if name in special:
        return special[name](name, arguments)
    reference = OPS[name].reference
    return {"torch": lambda: reference(*arguments)}


def _linear_peers(name, arguments):
    """Full-precision products, and torch's own dynamic int8."""
    x = arguments[0]
    rows, width = arguments[2].shape[0], x.shape[-1]  # a scale for every output feature
    layer = torch.nn.Linear(width, rows, bias=False)
    half, x_half = layer.weight.detach().bfloat16(), x.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer))
    weight = layer.weight.detach()
    return {
        "torch fp32": lambda: functional.linear(x, weight),
        "torch bf16": lambda: functional.linear(x_half, half),
        "torch dynamic int8": lambda: dynamic(x),
    }


def _gram_peers(name, arguments):
    x, _, out = arguments
    return {"torch X.T @ X": lambda: out.add_(x.T @ x)}


def _distillation_peers(name, arguments):
    """The plain loss with autograd, and the four products alone: the floor."""
    student, head, teacher, teacher_head, *_ = arguments
    student, head = (t.detach().clone().requires_grad_() for t in (student, head))

    @torch.enable_grad()
    def plain():
        student.grad = head.grad = None
        log_p = functional.log_softmax(student @ head.T, -1, dtype=torch.float32)
        log_q = functional.log_softmax(teacher @ teacher_head.T, -1, dtype=torch.float32)
        loss = functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        loss.backward()

    def products():
        with torch.no_grad():
            for start in range(0, len(student), 128):
                part = student[start : start + 128]
                scores = part @ head.T
                _ = teacher[start : start + 128] @ teacher_head.T
                _ = scores @ head
                _ = scores.T @ part

    return {"torch": plain, "its four products, 128 rows at a time": products}
