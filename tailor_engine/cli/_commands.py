"""What each command does; imported only when one is called."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tailor_engine import stages
from tailor_engine.cli import _display
from tailor_engine.cli._flags import config_values
from tailor_engine.errors import TailorError, UserError
from tailor_engine.io import recipes
from tailor_engine.stages._stage import make_config


def recipe(arguments: argparse.Namespace) -> None:
    """Print a recipe with all its defaults, or one line for each fault."""
    checked = recipes.load(arguments.recipe, arguments.changes)
    print(checked.as_yaml(), end="")


def run(arguments: argparse.Namespace) -> None:
    """Run a recipe in its run folder and write the report."""
    checked = recipes.load(arguments.recipe, arguments.changes)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "run is one process; launch its training stages alone on many devices, "
            "such as `torchrun -m tailor_engine.cli distill ...`"
        )
    from tailor_engine import pipeline
    from tailor_engine.io import report, runs

    out = Path(arguments.out or f"runs/{checked.name}")
    with runs.RunFolder(out) as folder, _display.Display() as display:
        folder.note = display.note
        model = load_model(checked.model, arguments)
        data = load_data(checked.domain, checked.general)
        display.data(data)
        folder.describe(
            {
                "recipe": checked.as_dict(),
                "seed": checked.seed,
                "model": {"source": checked.model, "sha256": pipeline.fingerprint(model)},
                "data": data.manifest(),
            }
        )
        pipeline.run(
            model,
            [pipeline.Step(name, config) for name, config in checked.stages],
            data,
            folder,
            evaluate=checked.evaluate,
            seed=checked.seed,
            observer=display,
        )
        page = report.write(out)
        display.line(f"report: {page}")


def run_stage(arguments: argparse.Namespace) -> None:
    """Run one stage on a model; write the new model and its report."""
    name = arguments.command_name
    config = make_config(stages.config_type(name), config_values(arguments), name)
    if name == "distill" and not arguments.teacher:
        raise UserError("distill needs --teacher: the dense model that the student imitates")
    out = Path(arguments.out) if arguments.out else None
    from tailor_engine import pipeline
    from tailor_engine.io import files, models

    if (
        out is not None
        and out.is_dir()
        and any(out.iterdir())
        and not (out / "config.json").exists()
    ):
        raise UserError(f"{out}: holds files that are not a model's; choose another --out")
    with _display.Display() as display:
        display.started(name, 1, 1)
        model = load_model(arguments.model, arguments)
        for role in ("teacher", "base"):
            if getattr(arguments, role):
                other = load_model(getattr(arguments, role), arguments)
                model = model.replace(**{role: other})
        data = load_data(arguments.domain, arguments.general)
        after, report = pipeline.run_stage(name, model, config, data, observer=display)
        described = pipeline.plain(vars(report))
        if int(os.environ.get("RANK", "0")):
            return  # every process of a distributed launch ends with the same model
        if out is not None and name != "evaluate":
            models.save(after, out)
            files.atomic_write_json(out / "report.json", described)
        elif out is not None:
            files.atomic_write_json(out, described)
        display.stage_done(name, described, out)


def corpus(arguments: argparse.Namespace) -> None:
    """Let a model write general text into a file."""
    from tailor_engine.corpus import CorpusConfig, write_corpus
    from tailor_engine.io import text

    config = make_config(CorpusConfig, config_values(arguments), "corpus")
    with _display.Display() as display:
        display.started("corpus", 1, 1)
        model = load_model(arguments.model, arguments)
        documents, how = write_corpus(model, config, display.progress)
        text.save_self_written(documents, how, arguments.out)
        display.line(f"{arguments.out}: {len(documents)} documents, {how['tokens']} tokens")


def diagnose(arguments: argparse.Namespace) -> None:
    """Measure a model on a domain; write the page and its tables."""
    from tailor_engine.diagnostics import DiagnoseConfig, diagnose
    from tailor_engine.io import diagnosis
    from tailor_engine.stages._stage import use_context

    config = make_config(DiagnoseConfig, config_values(arguments), "diagnose")
    diagnosis.check_place(arguments.out)
    with _display.Display() as display, use_context(display):
        display.started("diagnose", 1, 1)
        model = load_model(arguments.model, arguments)
        data = load_data(arguments.domain, arguments.general)
        found = diagnose(model, config, data)
        display.line(f"diagnosis: {diagnosis.write(found, arguments.out)}")


def report(arguments: argparse.Namespace) -> None:
    """Write the page of a run again."""
    from tailor_engine.io import report

    print(report.write(Path(arguments.run)))


def generate(arguments: argparse.Namespace) -> None:
    """Answer a prompt, word by word on a terminal."""
    if arguments.tokens < 1 or arguments.temperature < 0:
        raise UserError("generate: --tokens must be >= 1 and --temperature >= 0")
    import torch
    from transformers import TextStreamer

    model = load_model(arguments.model, arguments)
    tokenizer, text = model.tokenizer, arguments.prompt
    if tokenizer.chat_template and not arguments.raw:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    given = tokenizer(text, return_tensors="pt", add_special_tokens=arguments.raw)
    ids = given["input_ids"].to(model.device)
    if not ids.shape[1]:
        raise UserError("generate: the prompt is empty")
    torch.manual_seed(arguments.seed)
    sampling = {"temperature": arguments.temperature} if arguments.temperature else {}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        model.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=arguments.tokens,
            do_sample=bool(sampling),
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )


def ops(arguments: argparse.Namespace) -> None:
    """Print op x backend: chosen, available, or the reason why not."""
    from tailor_engine.ops import BACKENDS, OPS

    found: dict[str, Any] = {}
    for name, op in sorted(OPS.items()):
        reasons = {backend: op.missing(backend, arguments.device) for backend in BACKENDS}
        found[name] = {
            "chosen": op.choose(arguments.device),
            "backends": {
                backend: {"available": not reason, "reason": reason}
                for backend, reason in reasons.items()
            },
        }
    if arguments.json:
        print(json.dumps({"device": arguments.device, "ops": found}, indent=2))
        return
    numbers: dict[tuple[str, str], int] = {}
    rows = [["op", *BACKENDS]]
    for name, entry in found.items():
        row = [name]
        for backend, state in entry["backends"].items():
            if state["available"]:
                row.append("chosen" if backend == entry["chosen"] else "yes")
            else:
                place = numbers.setdefault((backend, state["reason"]), len(numbers) + 1)
                row.append(f"- [{place}]")
        rows.append(row)
    print(_display.table(rows))
    print(f"\nFor tensors on the {arguments.device}; TAILOR_BACKEND=NAME forces one.")
    for (backend, reason), place in numbers.items():
        print(f"[{place}] {backend}: {reason}")


def bench(arguments: argparse.Namespace) -> int:
    """Run the source tree's benchmarks, which an installed package does not carry."""
    import runpy

    if not Path("benchmarks/__main__.py").is_file():
        raise UserError(
            "bench: no benchmarks/ folder here; run it from the top of tailor_engine's source tree"
        )
    sys.path.insert(0, str(Path.cwd()))
    passed = arguments.arguments
    sys.argv = ["tailor bench", *(passed[1:] if passed[:1] == ["--"] else passed)]
    try:
        runpy.run_module("benchmarks", run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            raise TailorError(end.code) from None
        return end.code or 0
    return 0


def load_model(source: str, arguments: argparse.Namespace) -> Any:
    """Load a model, a run's last model, or a step's, onto the device of the command."""
    from tailor_engine.io import models, runs
    from tailor_engine.model import choose_device

    device, trust = choose_device(arguments.device), arguments.trust
    model = models.load(runs.model_path(source), allow_pickle=trust, trust_remote_code=trust)
    return model.to(device)


def load_data(domain: Any, general: Any) -> Any:
    """Load and split the domain's text and the general text."""
    from tailor_engine.data import Data
    from tailor_engine.io import text

    def one(described: Any) -> Any:
        if described is None:
            return None
        source, options = recipes.data_source(described)
        return text.load_corpus(source, text.SourceOptions(**options))

    return Data(one(domain), one(general))
