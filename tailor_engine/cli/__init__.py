"""The command `tailor`: the only part of the package that prints."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from tailor_engine import __version__, stages
from tailor_engine.cli._flags import Parser, add_config
from tailor_engine.errors import TailorError, UserError

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for the user's errors, 1 for ours, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if not debug:
        os.environ.update({key: os.environ.get(key, value) for key, value in _QUIET.items()})
        warnings.filterwarnings("ignore")
    if argv[:1] == ["bench"]:
        argv.insert(1, "--")  # options of the benchmarks, not of this parser
    try:
        parser = make_parser(next((word for word in argv if not word.startswith("-")), ""))
        arguments = parser.parse_args(argv)
        if not hasattr(arguments, "command"):
            parser.print_help()
            return 0
        if os.environ.get("TAILOR_TUNED") and arguments.command_name != "bench":
            from tailor_engine.io import tuned

            tuned.use_if_asked()
        return arguments.command(arguments) or 0
    except UserError as error:
        if debug:
            raise
        for line in getattr(error, "faults", None) or [str(error)]:
            _fail(line)
        return 2
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last finished stage or checkpoint")
        return 130
    except BrokenPipeError:  # `tailor ops | head`: nobody reads any more
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 141
    except Exception as error:
        if debug:
            raise
        what = str(error) if isinstance(error, TailorError) else f"{type(error).__name__}: {error}"
        _fail(f"{what}; run again with --debug for the traceback")
        return 1


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def make_parser(chosen: str = "") -> Parser:
    """Build the parser of every command, with the settings of the chosen one: they import torch."""
    parser = Parser(
        prog="tailor",
        description="Turn a general language model into a small, fast specialist.",
        epilog="`tailor COMMAND --help` lists its settings; `tailor run demo` shows it all.",
    )
    parser.add_argument("--version", action="version", version=f"tailor_engine {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command_name", metavar="COMMAND", title="commands")
    _add_run(commands)
    for name in stages.names():
        _add_stage(commands, name, chosen)
    _add_diagnose(commands, chosen)
    _add_corpus(commands, chosen)
    _add_reading(commands)
    return parser


def _command(commands: Any, name: str, summary: str) -> Parser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(command=_later(name), parser=parser)
    return parser


def _later(name: str) -> Any:
    """Return the function of a command, imported when it is called."""

    def call(arguments: argparse.Namespace) -> int | None:
        from tailor_engine.cli import _commands

        function = getattr(_commands, name, None)
        return (function or _commands.run_stage)(arguments)

    return call


def _add_run(commands: Any) -> None:
    parser = _command(commands, "run", "Run a recipe: every stage, measured, resumable.")
    parser.add_argument("recipe", help="a YAML file, or the name of an embedded recipe (demo)")
    parser.add_argument("--out", help="run folder (default runs/NAME)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change one setting: stages.prune.target=0.7, seed=1, model=FOLDER; repeatable",
    )  # fmt: skip
    _add_loading(parser)
    parser = _command(commands, "recipe", "Check a recipe and print it with all defaults.")
    parser.add_argument("action", choices=("check",), help="what to do with it")
    parser.add_argument("recipe", help="a YAML file, or the name of an embedded recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change one setting first; repeatable",
    )  # fmt: skip


def _add_stage(commands: Any, name: str, chosen: str) -> None:
    parser = _command(commands, name, stages.summary(name))
    parser.add_argument("model", help="a model folder, a run folder, a hub id or a GGUF file")
    parser.add_argument("--domain", required=True, help="the domain's text: a name, file or folder")
    parser.add_argument("--general", help="general text: a name, file or folder")
    needed = name != "evaluate"
    parser.add_argument("--out", required=needed, help="where the model and its report go")
    parser.add_argument("--teacher", help="the dense model that distillation imitates")
    parser.add_argument("--base", help="the untouched model that the result is compared with")
    _add_loading(parser)
    if name == chosen:
        add_config(parser, stages.config_type(name), name)


def _add_diagnose(commands: Any, chosen: str) -> None:
    parser = _command(commands, "diagnose", "Show what each layer does on a domain, in pictures.")
    parser.add_argument("model", help="a model folder, a run folder, a hub id or a GGUF file")
    parser.add_argument("--domain", required=True, help="the domain's text: a name, file or folder")
    parser.add_argument("--general", help="general text: a name, file or folder")
    parser.add_argument("--out", required=True, help="the folder of the page and its Parquet files")
    _add_loading(parser)
    if chosen == "diagnose":
        from tailor_engine.diagnostics import DiagnoseConfig

        add_config(parser, DiagnoseConfig)


def _add_loading(parser: Parser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="D",
        help="cpu, cuda or cuda:N (default auto: a GPU where there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--trust", action="store_true",
        help="allow pickle weights and code that comes with a model; both can run anything",
    )  # fmt: skip


def _add_corpus(commands: Any, chosen: str) -> None:
    parser = _command(commands, "corpus", "Let a model write general text, as a data set.")
    parser.add_argument("model", help="a model folder, a hub id or a GGUF file")
    parser.add_argument("--out", required=True, help="the file to write (.jsonl or .jsonl.xz)")
    _add_loading(parser)
    if chosen == "corpus":
        from tailor_engine.corpus import CorpusConfig

        add_config(parser, CorpusConfig)


def _add_reading(commands: Any) -> None:
    parser = _command(commands, "report", "Write the HTML page of a run again.")
    parser.add_argument("run", help="a run folder")
    parser = _command(commands, "generate", "Answer a prompt.")
    parser.add_argument("model", help="a model folder, a run folder, a hub id or a GGUF file")
    parser.add_argument("prompt", help="the text to answer")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="at most (default 128)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the text, without chat template"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X",
                        help="0 takes the likeliest token (default 0)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default 0)")
    _add_loading(parser)
    parser = _command(commands, "ops", "List every op and backend: chosen, available, or why not.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser = _command(commands, "bench", "Run the benchmarks of the source tree.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on; try `--help`")
