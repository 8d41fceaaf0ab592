"""Text that a model writes itself, so that its general ability can be kept without any data set.

Pruning and distillation need general text beside the domain's. Where none is at hand, the base
model's own writing serves: asked for articles, stories and lives it closes most of the gap to a
real corpus, and a share of text sampled freely from the start token adds code and web pages.
Source: data-free distillation as in LLM-QAT (Liu et al. 2023, arXiv:2305.17888), section 3.1.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tailor_engine.errors import UserError
from tailor_engine.prompts import TEMPLATES, TOPICS
from tailor_engine.stages._stage import option, validate

if TYPE_CHECKING:
    from tailor_engine.model import Model

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CorpusConfig:
    """How much the model writes, and how it is sampled."""

    tokens: int = option(150_000, "stop once this many tokens are kept", low=1)
    documents: int = option(100_000, "stop once this many documents are kept", low=1)
    batch: int = option(96, "documents sampled side by side", low=1, high=4096)
    seed: int = option(0, "of prompts and of sampling", low=0)
    temperature: float = option(1.0, "of sampling", low=0.05, high=5)
    top_p: float = option(0.95, "sample from the likeliest tokens of this mass", low=0.05, high=1)
    free_share: float = option(0.25, "share sampled from the start token alone", low=0, high=1)
    max_tokens: int = option(400, "a document is cut here", low=1)
    min_tokens: int = option(64, "shorter answers are dropped", low=0)
    min_distinct: float = option(0.6, "least share of distinct 4-grams of words", low=0, high=1)
    min_printable: float = option(0.99, "least share of printing characters", low=0, high=1)
    dtype: str = option("bfloat16", "of the sampling network", choices=("bfloat16", "float32"))


def write_corpus(
    model: Model, config: CorpusConfig, progress: Progress | None = None
) -> tuple[list[str], dict[str, Any]]:
    """Let the model write text; give back the kept documents and the recipe that made them.

    The same model, config, machine and thread count give the same documents.

    Raises: UserError for a setting out of range, and where the model writes nothing that passes
        the filter.
    """
    validate(config, "corpus")
    tokenizer = model.tokenizer
    network = copy.deepcopy(model.network).to(getattr(torch, config.dtype)).eval()
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(GROUPED)
    generator = torch.Generator(device="cpu").manual_seed(config.seed)
    documents: list[str] = []
    seen: set[str] = set()
    dropped = {"short": 0, "repetitive": 0, "unprintable": 0, "duplicate": 0}
    tokens = 0
    for number, prompts in enumerate(_prompt_batches(tokenizer, config)):
        answers = sample(network, prompts, config, generator, _stop_ids(network, tokenizer))
        for ids in answers:
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            fault = _fault(text, len(ids), config) or ("duplicate" if text in seen else "")
            if fault:
                dropped[fault] += 1
            elif tokens < config.tokens and len(documents) < config.documents:
                seen.add(text)
                documents.append(text)
                tokens += len(ids)
        if progress is not None:
            progress(min(tokens, config.tokens), config.tokens, f"{len(documents)} documents")
        if tokens >= config.tokens or len(documents) >= config.documents:
            break
        if number >= 3 and not documents:
            raise UserError(
                f"the model wrote nothing usable in {number + 1} batches of {config.batch} "
                f"({dropped}); give a data set instead, or lower min_tokens / min_distinct"
            )
    recipe = {
        "model": model.source,
        "method": "prompted through the chat template, and sampled freely from the start token; "
        "only the answers are kept",
        "config": asdict(config),
        "prompts": {"templates": [text for _, text in TEMPLATES], "topics": list(TOPICS)},
        "documents": len(documents),
        "tokens": tokens,
        "dropped": dropped,
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    return documents, recipe


def sample(
    network: torch.nn.Module,
    prompts: list[list[int]],
    config: CorpusConfig,
    generator: torch.Generator,
    stop_ids: set[int],
) -> list[list[int]]:
    """Sample one answer per prompt, all side by side, each until a stop token or `max_tokens`.

    Finished rows leave the batch and its cache as soon as they are an eighth of it.
    """
    device = next(network.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts]).to(device)
    answers: list[list[int]] = [[] for _ in prompts]
    active = torch.arange(len(prompts), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    cache = None
    with torch.no_grad():
        for _ in range(config.max_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            chosen = nucleus(output.logits[:, -1].float(), config, generator)
            finished |= torch.isin(chosen, stops)
            for row, token, done in zip(
                active.tolist(), chosen.tolist(), finished.tolist(), strict=True
            ):
                if not done:
                    answers[row].append(token)
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if bool(finished.all()):
                break
            if int(finished.sum()) * 8 >= len(finished):
                keep = (~finished).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                ids, mask, active, finished = ids[keep], mask[keep], active[keep], finished[keep]
    return answers


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token, the heads that share a key head taken as its queries.

    Stock attention copies the whole cache once per head of a group at each step, which is most of
    the time at this batch size.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    groups = key.shape[1]
    folded = query.view(rows, groups, heads // groups, width)
    output = F.scaled_dot_product_attention(folded, key, value, attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, width), None


GROUPED = "tailor_grouped"
AttentionInterface.register(GROUPED, _grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def nucleus(logits: torch.Tensor, config: CorpusConfig, generator: torch.Generator) -> torch.Tensor:
    """Draw one token per row from the nucleus of mass `top_p`, by rejection.

    A token lies in the nucleus when the tokens likelier than it hold less than `top_p`; drawing
    from the whole distribution until one does is the same law and spares sorting the vocabulary.

    Shapes: logits [B, V] -> [B].
    """
    mass = torch.softmax(logits / config.temperature, dim=-1)
    cumulative = mass.cumsum(-1)
    chosen = torch.zeros(len(mass), dtype=torch.int64, device=mass.device)
    open_rows = torch.arange(len(mass), device=mass.device)
    while len(open_rows):
        draw = torch.rand(len(open_rows), 1, generator=generator).to(mass.device)
        token = torch.searchsorted(cumulative[open_rows], draw * cumulative[open_rows, -1:])
        token = token.clamp(max=mass.shape[1] - 1)
        rows = mass[open_rows]
        above = torch.where(rows > rows.gather(1, token), rows, 0).sum(-1)
        accepted = above < config.top_p
        chosen[open_rows[accepted]] = token[accepted, 0]
        open_rows = open_rows[~accepted]
    return chosen


def _prompt_batches(tokenizer: Any, config: CorpusConfig) -> Iterator[list[list[int]]]:
    """Endless batches of token prompts: free ones in their share, else questions on topics."""
    rng = random.Random(config.seed)
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    prompted = bool(tokenizer.chat_template)
    owed = 0.0
    while True:
        owed += config.free_share
        if owed >= 1:
            owed -= 1
            yield [[start]] * config.batch
            continue
        rows = []
        for _ in range(config.batch):
            question = prompt(rng)
            if prompted:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
            else:
                rows.append([start, *tokenizer(question, add_special_tokens=False)["input_ids"]])
        yield rows


def prompt(rng: random.Random) -> str:
    """One request: a weighted template filled with a topic."""
    template = rng.choices([text for _, text in TEMPLATES], [weight for weight, _ in TEMPLATES])[0]
    return template.format(topic=rng.choice(TOPICS))


def _stop_ids(network: Any, tokenizer: Any) -> set[int]:
    stops = {tokenizer.eos_token_id, getattr(network.config, "eos_token_id", None)}
    stops |= set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    unknown = tokenizer.unk_token_id
    flat = {i for item in stops for i in (item if isinstance(item, list) else [item])}
    return {i for i in flat if i is not None and (i != unknown or i == 0)}


def _fault(text: str, tokens: int, config: CorpusConfig) -> str:
    """Why a document is dropped: "short", "unprintable", "repetitive"; "" keeps it."""
    if tokens < config.min_tokens:
        return "short"
    printable = sum((c.isprintable() or c in "\n\t") and c != "\ufffd" for c in text)
    if printable < config.min_printable * len(text):
        return "unprintable"
    return "repetitive" if distinct_share(text) < config.min_distinct else ""


def distinct_share(text: str, size: int = 4) -> float:
    """Distinct word n-grams over all of them: 1 for text that never repeats itself."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
