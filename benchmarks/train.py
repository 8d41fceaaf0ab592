"""`tailor bench train`: one distillation step of SmolLM2, ours beside plain PyTorch doing the same.

Teacher forward, student forward and backward, loss, clipping and AdamW on 4 rows of 256 tokens.
Ours is the step of the distill stage itself, in the number format that it would choose here.
"""

import contextlib
import copy
import functools
import statistics
import time

import torch
from torch.nn import functional

import tailor_engine
from tailor_engine import ops
from tailor_engine.data import Data
from tailor_engine.stages import _objective, _train
from tailor_engine.stages._precision import bfloat16_speedup, precision
from tailor_engine.stages._train_config import TrainConfig

from . import engines

ROWS, LENGTH = 4, 256
CPU = torch.device("cpu")
STEPPING = TrainConfig(steps=1000)  # never at its end while it is timed
PHASES = ("teacher", "student", "loss", "backward", "optimizer")


def student_of(model):
    """Return a copy of the network with its weights a little off, so that there is a loss."""
    network = copy.deepcopy(model.network)
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=model.device)
            parameter.add_(0.1 * parameter.std() * noise if parameter.dim() > 1 else 0)
    return network


class Phases:
    """Milliseconds of the parts of a step, from marks that the step sets at their ends."""

    def __init__(self):
        self.samples = {}

    def start(self):
        """Begin a step."""
        self.last = time.perf_counter()

    def end(self, phase):
        """Charge the time since the last mark to a phase."""
        now = time.perf_counter()
        self.samples.setdefault(phase, []).append(1000 * (now - self.last))
        self.last = now

    def medians(self):
        """Return {phase: median milliseconds}."""
        return {phase: statistics.median(times) for phase, times in self.samples.items()}


class Ours:
    """The distill stage's objective and its training loop's own step."""

    def __init__(self, model, rows, dtype, config=STEPPING):
        network = student_of(model)
        teacher = _objective.Teacher(model, dtype)
        objective = _objective.Imitation(network, model.family, dtype, teacher)
        self.training = _train._Training(objective, rows, (), config)
        self.prepared = self.training.accelerator.prepare(objective, self.training.optimizer)
        objective.train()
        self.phases = Phases()

    @property
    def losses(self):
        """The loss of each step so far."""
        return self.training.history.curves["loss"]

    def step(self):
        """Take one optimizer step."""
        self.phases.start()
        self.training._train_step(*self.prepared)
        self.phases.end("optimizer")

    @contextlib.contextmanager
    def marked(self):
        """Set marks at the ends of the phases."""
        phases, undo = self.phases, contextlib.ExitStack()

        def mark(owner, name, phase):
            before = getattr(owner, name)

            @functools.wraps(before)
            def timed(*arguments, **options):
                result = before(*arguments, **options)
                phases.end(phase())
                return result

            setattr(owner, name, timed)
            undo.callback(setattr, owner, name, before)

        whose = {True: "student", False: "teacher"}
        mark(_objective, "final_states", lambda: whose[torch.is_grad_enabled()])
        mark(ops, "linear_kl", lambda: "loss")
        mark(self.training.accelerator, "backward", lambda: "backward")
        with undo:
            yield


class Plain:
    """What one would write: whole logits, autograd, torch's fused AdamW."""

    def __init__(self, model, rows, dtype, size=ROWS):
        self.teacher, self.rows, self.dtype = model.network.eval(), rows, dtype
        self.device, self.size = model.device, size
        self.network, self.turn, self.phases = student_of(model).train(), 0, Phases()
        self.losses = []
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-4, fused=True)

    def step(self):
        """Take one optimizer step."""
        self.phases.start()
        indices = torch.arange(self.turn, self.turn + self.size) % len(self.rows)
        self.turn += self.size
        batch = _train.take(self.rows, indices, self.device)
        mixed = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            with torch.no_grad():
                wanted = self._logits(self.teacher, batch)
            self.phases.end("teacher")
            found = self._logits(self.network, batch)
            self.phases.end("student")
            log_p, log_q = (x.float().log_softmax(-1) for x in (found, wanted))
            loss = functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
            self.phases.end("loss")
        loss.backward()
        self.phases.end("backward")
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))
        self.phases.end("optimizer")

    def _logits(self, network, batch):
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        return network(**inputs, use_cache=False).logits[batch["labels"] != -100]

    def marked(self):
        """Say that the marks stand in the step itself."""
        return contextlib.nullcontext()


def run(quick=False, threads=None, json=None):
    """Yield one line a network, after all have been timed in turn; append them to a file."""
    if threads:
        torch.set_num_threads(threads)
    model = tailor_engine.load(engines.SOURCE)
    data = Data(tailor_engine.load_corpus("python-docs"), tailor_engine.load_corpus("self-written"))
    rows = data.mixed("train", model.tokenizer, LENGTH, 4 * ROWS, 0.5)
    dtype = precision("auto", CPU)
    name = f"tailor {str(dtype).removeprefix('torch.')}"
    steps = {
        name: Ours(model, rows, dtype),
        "torch fp32": Plain(model, rows, torch.float32),
    }
    speed = bfloat16_speedup("cpu", torch.get_num_threads())
    if speed > 0.5:  # with AVX2 alone its products take ten times as long, and a step minutes
        steps["torch bf16 autocast"] = Plain(model, rows, torch.bfloat16)
    else:
        yield f"torch bf16 autocast: not timed, its products run at {speed:.2f}x of float32 here"
    samples = {name: [] for name in steps}
    for number in range(3 if quick else 5):
        for name, each in steps.items():
            with each.marked():
                took = engines.milliseconds(each.step)
            if number:  # the first one allocates
                samples[name].append(took)
    results = list(engines.rows_of(samples, "train", f"{ROWS}x{LENGTH}", ROWS * LENGTH))
    for result in results:
        phases = steps[result["engine"]].phases.medians()
        result["phases_ms"] = {phase: phases[phase] for phase in PHASES if phase in phases}
        listed = "  ".join(f"{phase} {ms:.0f}" for phase, ms in result["phases_ms"].items())
        yield f"{engines.line(result)}   ms: {listed}"
    engines.record(results, "train", json)
