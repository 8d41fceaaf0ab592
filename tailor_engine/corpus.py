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

from tailor_engine.errors import UserError

if TYPE_CHECKING:
    from tailor_engine.model import Model

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CorpusConfig:
    """How much the model writes, and how it is sampled."""

    tokens: int = 150_000  # stop once this many tokens are kept; 1,000 or more
    documents: int = 100_000  # stop once this many documents are kept
    batch: int = 96  # documents sampled side by side; 1 to 1,024
    seed: int = 0  # of prompts and of sampling
    temperature: float = 1.0  # of sampling; 0.1 to 2
    top_p: float = 0.95  # nucleus: sample from the likeliest tokens that hold this mass; 0.1 to 1
    free_share: float = 0.25  # share of batches sampled from the start token alone; 0 to 1
    max_tokens: int = 400  # a document is cut here
    min_tokens: int = 64  # shorter answers are dropped
    min_distinct: float = 0.6  # distinct 4-grams of words / all of them; below it text is repetitive
    dtype: str = "bfloat16"  # of the sampling network: "bfloat16" or "float32"


def write_corpus(
    model: Model, config: CorpusConfig, progress: Progress | None = None
) -> tuple[list[str], dict[str, Any]]:
    """Let the model write text; give back the kept documents and the recipe that made them.

    The same model, config, machine and thread count give the same documents.

    Raises: UserError where the model writes nothing that passes the filter.
    """
    tokenizer = model.tokenizer
    network = copy.deepcopy(model.network).to(getattr(torch, config.dtype)).eval()
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


def nucleus(
    logits: torch.Tensor, config: CorpusConfig, generator: torch.Generator
) -> torch.Tensor:
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
    printable = sum(c.isprintable() or c in "\n\t" for c in text)
    if printable < 0.99 * len(text) or "\ufffd" in text:
        return "unprintable"
    return "repetitive" if distinct_share(text) < config.min_distinct else ""


def distinct_share(text: str, size: int = 4) -> float:
    """Distinct word n-grams over all of them: 1 for text that never repeats itself."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


# Weights: long factual prose first, since that kind recovered most of a real corpus' worth.
TEMPLATES: tuple[tuple[int, str], ...] = (
    (6, "Write an encyclopedia article about {topic}."),
    (4, "Write a detailed article about the history of {topic}."),
    (4, "Tell a true story about {topic}."),
    (4, "Write about the life of a person who changed {topic}."),
    (3, "Write a news report about {topic}."),
    (3, "Explain {topic} to a student in several paragraphs."),
    (2, "Write a long essay on {topic}."),
    (2, "Describe how {topic} came about, with names, places and dates."),
    (2, "What are the most important facts about {topic}? Answer in full sentences."),
    (1, "Write a step-by-step guide for a beginner who wants to know more about {topic}."),
    (1, "Write a letter to a friend about {topic}."),
    (1, "Write a dialogue between two people who disagree about {topic}."),
    (1, "List ten surprising things about {topic} and explain each of them."),
    (1, "Write a short story in which {topic} plays a part."),
    (1, "Write a review of a book about {topic}."),
    (1, "Write the opening chapter of a textbook on {topic}."),
    (1, "Compare two views of {topic} and weigh them."),
    (1, "Write a speech about {topic}."),
    (1, "Write a small computer program that has to do with {topic}, and explain it."),
    (1, "Pose five problems about {topic} and solve them."),
)

TOPICS: tuple[str, ...] = tuple(
    topic.strip()
    for topic in """
    the Roman Empire; the French Revolution; the Silk Road; the Black Death; the Ottoman Empire
    ancient Egypt; the Maya; the Vikings; the Mongol Empire; the Industrial Revolution
    the First World War; the Second World War; the Cold War; the American Civil War; apartheid
    the Renaissance; the Reformation; the Age of Exploration; feudal Japan; the Ming dynasty
    the Kingdom of Kongo; the Inca roads; the printing press; the abolition of slavery; suffrage
    volcanoes; earthquakes; glaciers; coral reefs; deserts; rainforests; hurricanes; the oceans
    rivers and floods; the Himalaya; the Amazon; the Arctic; the Sahara; Antarctica; islands
    the Sun; the Moon landing; black holes; comets; the planet Mars; the Milky Way; telescopes
    satellites; space stations; rockets; the Big Bang; gravity; light; magnetism; electricity
    atoms; the periodic table; chemical reactions; acids; metals; crystals; water; the atmosphere
    evolution; genetics; cells; bacteria; viruses; fungi; mosses; trees; flowers; insects; bees
    butterflies; spiders; sharks; whales; frogs; snakes; dinosaurs; owls; penguins; wolves; horses
    cats; dogs; elephants; bats; the human heart; the brain; sleep; vaccines; antibiotics; surgery
    diabetes; cancer research; nutrition; nursing; mental health; public health; childbirth; ageing
    mathematics; probability; geometry; prime numbers; algebra; statistics; logic; cryptography
    computers; the Internet; programming languages; databases; robots; video games; artificial minds
    telephones; radio; television; film; photography; newspapers; libraries; museums; schools
    universities; law courts; constitutions; elections; parliaments; taxes; banks; money; inflation
    trade unions; insurance; stock markets; the United Nations; human rights; refugees; migration
    railways; bridges; ships; canals; aeroplanes; bicycles; cars; lighthouses; harbours; tunnels
    cathedrals; castles; skyscrapers; gardens; city planning; housing; roads; sewers; power stations
    wind power; nuclear energy; coal mining; petroleum; steel; glass; paper; cotton; leather; plastics
    wheat; rice; potatoes; coffee; tea; chocolate; cheese; wine; bread; salt; sugar; spices; fishing
    beekeeping; dairy farming; cooking; baking; sewing; carpentry; pottery; blacksmithing; clocks
    painting; sculpture; opera; jazz; the violin; the piano; folk songs; ballet; theatre; poetry
    the novel; fairy tales; epic poems; comic books; architecture; calligraphy; fashion; jewellery
    football; cricket; baseball; basketball; tennis; chess; swimming; the Olympic Games; mountaineering
    boxing; cycling races; sailing; skiing; horse racing; philosophy; ethics; Buddhism; Islam
    Christianity; Judaism; Hinduism; Greek mythology; Norse mythology; pilgrimage; monasteries
    weddings; funerals; holidays; family life; friendship; travel; hotels; street markets; post offices
    firefighters; police work; detectives; sailors; soldiers; pirates; explorers; inventors; engineers
    a small village; a royal family; a lost city; a famous battle; a court case; a shipwreck
    a scientific mistake; an election; an expedition; a flood; a long drought; a school teacher
    """.replace("\n", ";").split(";")
    if topic.strip()
)
