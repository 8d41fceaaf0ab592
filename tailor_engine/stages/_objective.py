"""What a training step minimises: cross-entropy on labels, or a teacher's probabilities and states.

Only labelled tokens reach the head, and the head's product and the loss are one op, so no objective
ever holds a [tokens, vocabulary] matrix.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine import ops
from tailor_engine.errors import UserError
from tailor_engine.families._family import Family
from tailor_engine.fused import fuse
from tailor_engine.model import Model
from tailor_engine.stages._mask import attention_mask
from tailor_engine.stages._train import take

Batch = dict[str, Tensor]


class CrossEntropy(nn.Module):
    """Mean cross-entropy of the labelled tokens."""

    def __init__(self, network: Any, family: Family, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.family, self.dtype = network, family, dtype

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        hidden, _ = final_states(self.network, self.family, batch, self.dtype)
        weight = self.family.head_weight(self.network)
        labels = labelled(batch, batch["labels"])
        softcap = self.family.softcap(self.network.config)
        # With cross_entropy=1 the op reads no teacher; any of the right shape will do.
        unread = hidden.detach(), weight.detach()
        loss = ops.linear_kl(hidden, weight, *unread, labels, cross_entropy=1.0, softcap=softcap)
        return {"loss": loss}


class Imitation(nn.Module):
    """Divergence from a teacher's probabilities, its hidden states and the labels, mixed."""

    def __init__(
        self,
        network: Any,
        family: Family,
        dtype: torch.dtype,
        teacher: Teacher,
        *,
        divergence: str = "forward",
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        hidden_weight: float = 0.0,
        hidden_loss: str = "cosine",
        hidden_map: list[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.family, self.dtype = network, family, dtype
        self.teacher = [teacher]  # in a list: not a submodule, so never trained nor saved
        self.divergence, self.temperature, self.cross_entropy = (
            divergence,
            temperature,
            cross_entropy,
        )
        self.hidden_weight, self.hidden_loss = hidden_weight, hidden_loss
        self.hidden_map = hidden_map or []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        student_layers = [student for student, _ in self.hidden_map]
        hidden, states = final_states(self.network, self.family, batch, self.dtype, student_layers)
        weight = self.family.head_weight(self.network)
        softcap = self.family.softcap(self.network.config)
        labels = labelled(batch, batch["labels"]) if self.cross_entropy else None
        if "teacher_ids" in batch:
            divergence = self._from_cache(batch, hidden, weight, labels, softcap)
            return {"loss": divergence, "divergence": divergence}
        teacher = self.teacher[0]
        wanted, wanted_states = teacher.states(batch, [layer for _, layer in self.hidden_map])
        divergence = ops.linear_kl(
            hidden,
            weight,
            wanted,
            teacher.head,
            labels,
            divergence=self.divergence,
            temperature=self.temperature,
            cross_entropy=self.cross_entropy,
            softcap=softcap,
            teacher_softcap=teacher.softcap,
        )
        if not self.hidden_map:
            return {"loss": divergence, "divergence": divergence}
        distance = torch.stack(
            [
                distance_of(states[student], wanted_states[layer], self.hidden_loss)
                for student, layer in self.hidden_map
            ]
        ).mean()
        loss = divergence + self.hidden_weight * distance
        return {"loss": loss, "divergence": divergence, "hidden": distance}

    def _from_cache(
        self, batch: Batch, hidden: Tensor, weight: Tensor, labels: Tensor | None, softcap: float
    ) -> Tensor:
        return ops.linear_kl_topk(
            hidden,
            weight,
            labelled(batch, batch["teacher_ids"]).long(),
            labelled(batch, batch["teacher_log_probs"]),
            labels,
            temperature=self.temperature,
            cross_entropy=self.cross_entropy,
            softcap=softcap,
        )


class Teacher:
    """A frozen model that says what it would have predicted."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.family, self.dtype, self.network = model.family, dtype, model.network
        self.head = model.family.head_weight(model.network).detach().to(dtype)
        self.softcap = model.family.softcap(model.config)
        if dtype != torch.float32:
            # Autocast casts a frozen weight again at each use; a rounded copy reads half the bytes.
            self.network = copy.deepcopy(model.network)
            for _, _, linear in model.family.linears(self.network):
                linear.to(dtype)
            fuse(self.network, model.family)
        self.network.eval()

    @torch.no_grad()
    def states(self, batch: Batch, layers: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the final hidden states of the labelled tokens, and those after some blocks."""
        return final_states(self.network, self.family, batch, self.dtype, layers)

    @torch.no_grad()
    def cached(
        self, rows: Any, k: int, batch_size: int, device: torch.device, temperature: float = 1.0
    ) -> CachedRows:
        """Return the rows with the teacher's k most likely tokens of every position."""
        count, length = rows.labels.shape
        ids = torch.zeros(count, length, k, dtype=torch.int32)
        log_probs = torch.zeros(count, length, k)
        head = self.head
        for indices in torch.arange(count).split(batch_size):
            batch = take(rows, indices, device)
            found_ids, found = [], []
            for part in self.states(batch, [])[0].split(256):
                logits = (part @ head.T).float()
                if self.softcap:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                top, chosen = torch.log_softmax(logits / temperature, -1).topk(k)
                found_ids.append(chosen.int())
                found.append(top)
            valid = rows.labels[indices] != -100
            if found:
                ids[indices] = ids[indices].masked_scatter(
                    valid[..., None], torch.cat(found_ids).cpu()
                )
                log_probs[indices] = log_probs[indices].masked_scatter(
                    valid[..., None], torch.cat(found).cpu()
                )
        extra = {"teacher_ids": ids, "teacher_log_probs": log_probs}
        return CachedRows(rows.input_ids, rows.position_ids, rows.labels, extra)


@dataclass
class CachedRows:
    """Rows with what a teacher said about them, so that it need not be asked at every epoch."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)


def final_states(
    network: Any, family: Family, batch: Batch, dtype: torch.dtype, layers: list[int] | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run a network up to its head.

    Shapes: the final hidden states of the labelled tokens [T, D] in `dtype`, and by block index
        those after some blocks [T, D]. Documents of a row do not see each other: position ids
        restart at each, from which transformers builds the mask (no attention_mask, no cache).
    """
    positions = batch["position_ids"]
    device = positions.device.type
    with (
        torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16),
        _watched(family.blocks_of(network), layers or [], batch) as states,
    ):
        output = family.body_of(network)(
            input_ids=batch["input_ids"],
            position_ids=positions,
            attention_mask=attention_mask(network, positions),
            use_cache=False,
        )
    return labelled(batch, output.last_hidden_state).to(dtype), states


def labelled(batch: Batch, values: Tensor) -> Tensor:
    """Return the values [B, L, ...] of the labelled tokens, [T, ...].

    Their places came with the batch: to look for them here would wait for the device.
    """
    return values.flatten(0, 1)[batch["labelled"]]


@contextlib.contextmanager
def _watched(blocks: nn.ModuleList, layers: list[int], batch: Batch) -> Iterator[dict]:
    states: dict[int, Tensor] = {}

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[layer] = labelled(batch, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [blocks[layer].register_forward_hook(watch(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def distance_of(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return how far hidden states [T, D] are apart, the mean over tokens.

    Numbers: "cosine" is 1 - cos; "mse" is |student - teacher|^2 / |teacher|^2 per token, so that
        tokens with massive activations do not drown the others.
    """
    student, teacher, tokens = student.float(), teacher.float(), max(1, student.shape[0])
    if kind == "cosine":
        return (1 - nn.functional.cosine_similarity(student, teacher, dim=-1)).sum() / tokens
    scale = teacher.square().sum(-1).clamp_min(1e-12)
    return ((student - teacher).square().sum(-1) / scale).sum() / tokens


def layer_map(student: int, teacher: int, count: int) -> list[tuple[int, int]]:
    """Pair `count` student blocks, evenly spaced up to the last, with teacher blocks by depth.

    Numbers: student and teacher are numbers of blocks; block i of the student answers to the
        teacher's block at the same share of the depth.
    """
    count = min(count, student)
    chosen = [round((k + 1) * student / count) - 1 for k in range(count)]
    return [(i, round((i + 1) * teacher / student) - 1) for i in chosen]


def require_same_vocabulary(student: Model, teacher: Model) -> None:
    """Check that student and teacher number their tokens alike.

    Raises:
        UserError: with both sizes, or the first token that differs.
    """
    sizes = [int(m.family.head_weight(m.network).shape[0]) for m in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"distillation needs one vocabulary: the student has {sizes[0]} tokens, "
            f"the teacher {sizes[1]}; take a teacher with the student's tokenizer"
        )
    if student.tokenizer is teacher.tokenizer:
        return
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise UserError(
            f"distillation needs one vocabulary: token {token!r} has id {ours.get(token)} in the "
            f"student and {theirs.get(token)} in the teacher; take a teacher with the student's "
            "tokenizer"
        )
