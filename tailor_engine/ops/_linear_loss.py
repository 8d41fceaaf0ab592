"""What the losses behind a linear head share: which rows count, checks, and the tied gradient."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._op import Op

IGNORED = -100
Rows = tuple[Tensor, Tensor]


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a loss of this input is summed."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_weights(hidden: Tensor, labels: Tensor | None, mask: Tensor | None) -> Rows:
    """Return what each row weighs in the mean divergence and in the mean cross-entropy, [T] each.

    A row counts for the divergence where the mask says so (without a mask: where its label is not
    -100), and for the cross-entropy where it also has a label.
    """
    every = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    labelled = every if labels is None else labels != IGNORED
    counted = labelled if mask is None else mask
    labelled = labelled & counted
    divergence, entropy = (
        rows.to(wide(hidden)) / rows.sum().clamp(min=1) for rows in (counted, labelled)
    )
    return divergence, entropy


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Return ``softcap * tanh(logits / softcap)``, or the logits where softcap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each row and its gradient; a row without a label counts as 0."""
    log_p = torch.log_softmax(logits, -1)
    picked = labels.clamp(min=0)[:, None]
    gradient = log_p.exp().scatter_add(1, picked, -torch.ones_like(log_p[:, :1]))
    return -log_p.gather(1, picked)[:, 0], gradient


def through_head(
    gradient: Tensor, hidden: Tensor, weight: Tensor, to_hidden: bool, to_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return d hidden [T, D] and d weight [V, D] of d logits [T, V]; empty where not asked for."""
    rounded = gradient.to(hidden.dtype)
    d_hidden = rounded @ weight.to(hidden.dtype) if to_hidden else hidden.new_empty(0)
    if to_weight:
        d_weight = (rounded.T @ hidden).to(wide(hidden))
    else:
        d_weight = hidden.new_empty(0, dtype=wide(hidden))
    return d_hidden, d_weight


def check_head(op_name: str, hidden: Tensor, weight: Tensor, who: str) -> None:
    """Require hidden states [T, D] and a head [V, D]."""
    check.dimensions(op_name, f"{who}_hidden", hidden, 2)
    check.dtype(op_name, f"{who}_hidden", hidden, check.FLOATS)
    check.dimensions(op_name, f"{who}_weight", weight, 2)
    check.dtype(op_name, f"{who}_weight", weight, check.FLOATS)
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op_name}: {who}_weight must have shape [V, {hidden.shape[1]}] for {who}_hidden "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )


def check_targets(
    op_name: str, tokens: int, vocabulary: int, labels: Tensor | None, mask: Tensor | None
) -> None:
    """Require labels [T] of known ids or -100, and a mask [T]."""
    if labels is not None:
        check.shape(op_name, "labels", labels, (tokens,))
        check.ids(op_name, "labels", labels, vocabulary, ignored=IGNORED)
    check.token_mask(op_name, mask, tokens)


def check_numbers(op_name: str, temperature: float, mix: float, has_labels: bool) -> None:
    """Require a usable temperature and mixing weight."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op_name}: temperature must be above 0, got {temperature}")
    if not 0 <= mix <= 1:
        raise ValueError(f"{op_name}: cross_entropy must be from 0 to 1, got {mix}")
    if mix > 0 and not has_labels:
        raise ValueError(f"{op_name}: cross_entropy={mix} needs labels, got None")


def check_softcap(op_name: str, name: str, value: float) -> None:
    """Require a soft cap of 0 (none) or more."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{op_name}: {name} must be 0 (none) or above, got {value}")


def in_autocast(hidden: Tensor) -> Tensor:
    """Return hidden states in the dtype that autocast asks for; gradients come back in theirs."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype in (torch.float32, torch.bfloat16):
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def without_autocast(hidden: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the products run in the dtype that was chosen here."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def tie_gradient(declared: Op, count: int) -> None:
    """Tie the gradients that the forward pass computed; backward only scales them.

    The op has `count` inputs, the first two hidden states and head, and returns (loss, d hidden,
    d weight).
    """

    def save(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, d_hidden, d_weight = output
        ctx.mark_non_differentiable(d_hidden, d_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = [t.dtype for t in inputs[:2]]

    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple:
        found: list[Tensor | None] = [None, None]
        last_use = getattr(ctx, "sole_holder", False) and not _graph_is_kept()
        for i, gradient in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[i] and d_loss is not None:
                if gradient.numel() == 0 and gradient.dim() == 1:
                    raise RuntimeError(
                        f"{declared.name}: this gradient was not asked for in the forward pass"
                    )
                found[i] = _scaled(gradient, d_loss, ctx.dtypes[i], last_use)
        return (*found, *[None] * (count - 2))

    declared.gradient(backward, save)


def sole_loss(outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the loss alone: nobody but its backward holds the gradients any longer."""
    loss = outputs[0]
    if not torch.compiler.is_compiling() and loss.grad_fn is not None:
        loss.grad_fn.sole_holder = True  # type: ignore[attr-defined]
    return loss


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype, last_use: bool) -> Tensor:
    """Return ``gradient * by`` in a dtype, in one pass over a gradient as large as a head.

    A GPU is never asked whether the factor is 1: that would wait for it.
    """
    if type(by) is not Tensor or torch.is_grad_enabled():
        return (gradient * by.to(gradient.dtype)).to(dtype)
    if last_use and by.device.type == "cpu" and by.item() == 1:
        return gradient.to(dtype)
    if gradient.dtype != dtype:
        return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))
    return gradient.mul_(by) if last_use else gradient * by.to(dtype)


def _graph_is_kept() -> bool:
    """Say whether this backward may be followed by another one through the same graph."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
