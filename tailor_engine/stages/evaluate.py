"""Measure a model: quality on held-out text, speed, memory, cost, and a few answers to read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailor_engine.data import Corpus, Data, Rows
from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages._decode import decode
from tailor_engine.stages._precision import autocast
from tailor_engine.stages._stage import Report, context, option, stage

HEAD_CHUNK = 256  # tokens whose logits exist at once: 50 MB of float32 at a vocabulary of 49,152


@dataclass(frozen=True)
class EvaluateConfig:
    """How much to measure."""

    rows: int = option(32, "held-out sequences of each corpus", low=1)
    sequence_length: int = option(256, "tokens a sequence", low=16)
    batch_size: int = option(8, "sequences a forward pass", low=1)
    split: str = option("test", "the split to report on", choices=("test", "validation"))
    prompt_tokens: int = option(64, "tokens of the prompt whose latency is measured", low=1)
    new_tokens: int = option(32, "tokens generated for the latency; 0 skips it", low=0)
    samples: int = option(0, "prompts answered by the base model and by this one", low=0)
    sample_tokens: int = option(64, "tokens of each answer", low=1)
    price_per_hour: float = option(0.10, "price of this machine, dollars an hour", low=0)
    precision: str = option(
        "auto", "of the quality figures", choices=("auto", "float32", "bfloat16")
    )


@stage(EvaluateConfig)
def evaluate(model: Model, config: EvaluateConfig, data: Data) -> tuple[Model, Report]:
    """Measure quality, latency, memory and cost; the model comes back unchanged."""
    metrics: dict[str, Any] = {}
    for name, corpus in (("domain", data.domain), ("general", data.general)):
        if corpus is None:
            continue
        rows = corpus.rows(config.split, model.tokenizer, config.sequence_length, limit=config.rows)
        metrics |= {f"{name}_{key}": value for key, value in quality(model, rows, config).items()}
    metrics["parameters"] = model.parameters
    metrics["size_bytes"] = model.size_bytes
    if config.new_tokens:
        metrics |= latency(model, config)
    if config.samples:
        metrics["samples"] = answers(model, data.domain, config)
    return model, Report("evaluate", dataclasses.asdict(config), metrics=metrics)


def quality(model: Model, rows: Rows, config: EvaluateConfig) -> dict[str, float]:
    """Return perplexity, bits per byte, next-token accuracy and the divergence from the base.

    Numbers: ``kl_to_base`` is KL(base || model) in nats a token, left out where the model has only
        some of the base's tokens; ``perplexity_stderr`` is the standard error of the perplexity,
        from the spread of the sequences' own means.
    Raises: UserError for a model whose logits are not finite (the layer is named), or whose
        vocabulary is neither the base's nor a part of it.
    """
    base = model.base if _one_vocabulary(model) else None
    reference = None if base is None else final_hidden(base, rows, config)
    hidden = final_hidden(model, rows, config)
    counted = rows.labels != -100
    labels = rows.labels[counted]
    losses, hits, divergences = [], [], []
    with torch.inference_mode():
        for start in range(0, len(labels), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            log_probs = logits(model, hidden[part]).log_softmax(-1)
            target = labels[part].to(log_probs.device)
            losses.append(-log_probs.gather(1, target[:, None])[:, 0])
            hits.append(log_probs.argmax(-1) == target)
            if base is not None and reference is not None:
                truth = logits(base, reference[part]).log_softmax(-1)
                divergences.append((truth.exp() * (truth - log_probs)).sum(-1))
    loss = torch.cat(losses).double().cpu()
    if not torch.isfinite(loss).all():
        raise UserError(_first_bad_layer(model, rows))
    mean = loss.mean().item()
    found = {
        "perplexity": math.exp(mean),
        "perplexity_stderr": math.exp(mean) * _standard_error(loss, counted),
        "bits_per_byte": loss.sum().item() / math.log(2) / max(rows.target_bytes, 1),
        "accuracy": torch.cat(hits).double().mean().item(),
        "tokens": len(labels),
    }
    if base is not None or model.base is None:
        kl = torch.cat(divergences).double().mean().item() if divergences else 0.0
        found["kl_to_base"] = kl
    return found


def _one_vocabulary(model: Model) -> bool:
    """Say whether the base scores the same tokens; it has more where the vocabulary was cut."""
    if model.base is None:
        return True
    sizes = [m.config.get_text_config().vocab_size for m in (model.base, model)]
    if sizes[0] == sizes[1]:
        return True
    if model.tokenizer.get_vocab().keys() - model.base.tokenizer.get_vocab().keys():
        raise UserError(
            f"the base has {sizes[0]} tokens and the model {sizes[1]}: "
            "their divergence is not defined"
        )
    return False


# The base is the same for every stage of a run, so its hidden states are computed once a set of
# rows: 16,384 tokens of width 576 are 38 MB.
_hidden_of_base: weakref.WeakKeyDictionary[Any, dict[Any, Tensor]] = weakref.WeakKeyDictionary()


def final_hidden(model: Model, rows: Rows, config: EvaluateConfig) -> Tensor:
    """Return the final hidden states [N, D] of the tokens that carry a label, in order."""
    content = int(rows.input_ids.sum()), int(rows.labels.sum())
    key = (rows.input_ids.shape, *content, config.batch_size, config.precision)
    if model.base is None and key in _hidden_of_base.setdefault(model.network, {}):
        return _hidden_of_base[model.network][key]
    body, parts = model.family.body_of(model.network), []
    with torch.inference_mode(), autocast(model.device, config.precision):
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            states = body(
                input_ids=batch.input_ids.to(model.device),
                position_ids=batch.position_ids.to(model.device),
                use_cache=False,
            ).last_hidden_state
            parts.append(states[(batch.labels != -100).to(states.device)].float())
            done = min(start + config.batch_size, len(rows))
            context().progress(done, len(rows), "held-out text")
    hidden = torch.cat(parts)
    if model.base is None:
        _hidden_of_base[model.network][key] = hidden
    return hidden


def logits(model: Model, hidden: Tensor) -> Tensor:
    """Return the logits [N, V] of final hidden states, softcapped where the family does so."""
    head = model.family.head_of(model.network)
    scores = head(hidden.to(model.device)).float()
    cap = model.family.softcap(model.config)
    return cap * torch.tanh(scores / cap) if cap else scores


def latency(model: Model, config: EvaluateConfig) -> dict[str, float]:
    """Time greedy decoding with a key-value cache: first token, each further token, memory.

    Numbers: milliseconds of wall time; ``peak_bytes`` is the weights plus the largest sum of live
        activations and cache that the allocator saw; ``cost_per_million_tokens`` is in dollars,
        one request at a time.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (1, config.prompt_tokens), generator=generator)
    prompt = prompt.to(model.device)
    for _ in decode(model.network, prompt, 2):
        pass  # warm up
    first, *later = decode(model.network, prompt, config.new_tokens)
    milliseconds = np.array(later or [first])
    tokens_per_second = 1000 / milliseconds.mean()
    return {
        "latency_ms_first_token": first,
        "latency_ms_p50": float(np.percentile(milliseconds, 50)),
        "latency_ms_p95": float(np.percentile(milliseconds, 95)),
        "tokens_per_second": float(tokens_per_second),
        "peak_bytes": model.size_bytes + _activation_bytes(model, prompt),
        "cost_per_million_tokens": config.price_per_hour / 3600 / tokens_per_second * 1e6,
    }


def answers(model: Model, corpus: Corpus, config: EvaluateConfig) -> list[dict[str, str]]:
    """Return a few held-out prompts with the base model's and this model's greedy answers."""
    prompts = corpus.prompts(config.split, model.tokenizer, config.samples)
    return [
        {
            "prompt": text,
            "base": answer(model.base or model, ids, config.sample_tokens),
            "specialist": answer(model, ids, config.sample_tokens),
        }
        for text, ids in prompts
    ]


def answer(model: Model, ids: list[int], tokens: int) -> str:
    """Return the greedy continuation of a prompt as text."""
    prompt = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        output = model.network.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id,
        )
    return model.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def _standard_error(loss: Tensor, counted: Tensor) -> float:
    """Return the standard error of the mean loss: sequences are independent, tokens are not."""
    sizes = counted.sum(1)
    means = [part.mean() for part in loss.split(sizes.tolist()) if len(part)]
    if len(means) < 2:
        return math.nan
    return (torch.stack(means).std() / math.sqrt(len(means))).item()


def _activation_bytes(model: Model, prompt: Tensor) -> int:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        list(decode(model.network, prompt, 4))
        return torch.cuda.max_memory_allocated(model.device) - before
    with LiveBytes() as live:
        list(decode(model.network, prompt, 4))
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if address not in self.known | given:  # neither counted before nor a view of an input
                self.known.add(address)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, address, size)
        return result

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _first_bad_layer(model: Model, rows: Rows) -> str:
    """Name the first block whose output is not finite."""
    bad: list[int] = []

    def watch(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if not torch.isfinite(states).all():
                bad.append(index)

        return hook

    blocks = model.family.blocks_of(model.network)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(watch(index)).remove)
        ids, positions = rows.input_ids[:1], rows.position_ids[:1]
        body = model.family.body_of(model.network)
        body(ids.to(model.device), position_ids=positions.to(model.device), use_cache=False)
    where = f"block {bad[0]}" if bad else "the head"
    return f"{model.source}: activations are not finite from {where} on; the weights are damaged"
