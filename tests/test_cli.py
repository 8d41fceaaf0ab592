"""Bad input gives one clear line; good input does what the help says."""

import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tailor_engine import __version__, cli, stages
from tailor_engine.errors import TailorError
from tailor_engine.io import models, recipes, runs
from tailor_engine.ops import unavailable
from tailor_engine.stages.evaluate import answer
from tests import workshop
from tests.tiny import tiny

SHORT = ["--sequence-length", "32"]
PRUNE = [*SHORT, "--rows", "16", "--fisher-rows", "4", "--rounding", "32"]
EVALUATE = [*SHORT, "--rows", "2", "--new-tokens", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a furnished folder, which is also the working folder of every test here."""
    return workshop.furnish(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def tailor(capsys):
    """Return a function that runs a command here and gives (code, stdout, stderr)."""

    def run(*argv):
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(tailor):
    """Return a function that expects one line of error with these words."""

    def run(argv, *words, code=2):
        got, out, err = tailor(*argv)
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert got == code, (out, err)
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        for word in words:
            assert word in lines[0], err
        return err

    return run


def stage(name, model="tiny", *more, domain="domain.txt", out="out"):
    return [name, model, "--domain", domain, "--general", "general.txt", "--out", out, *more]


# --- what a person mistypes -----------------------------------------------------------------------

FLAGS = [
    (["prun"], ["unknown command 'prun'", "did you mean 'prune'?"]),
    (stage("prune", "tiny", "--taget", "0.5"), ["'--taget'", "did you mean --target?"]),
    (["prune", "tiny", "--out", "x"], ["--domain"]),
    (stage("prune", "tiny", "--target", "7"), ["target", "<= 1", "got 7"]),
    (stage("prune", "tiny", "--target", "much"), ["target must be float", "'much'"]),
    (stage("prune", "tiny", "--criterion", "cfps"), ["one of", "did you mean 'cfsp'?"]),
    (stage("quantize", "tiny", "--bits", "5"), ["bits must be one of", "got 5"]),
    (stage("distill"), ["distill needs --teacher"]),
    (["generate", "tiny", "hello", "--tokens", "0"], ["--tokens must be >= 1"]),
    (["recipe", "chek", "demo"], ["'chek'", "did you mean 'check'?"]),
    (["run", "dmeo"], ["dmeo: no such recipe file", "demo"]),
    (["run", "recipe.yaml", "--set", "seed"], ["--set seed: expected KEY=VALUE"]),
    (["run", "recipe.yaml", "--set", "stages.prun.target=1"], ["stage 'prun' is not there"]),
    (["run", "recipe.yaml", "--set", "stages.prune.taget=1"], ["did you mean 'target'?"]),
    (["report", "nowhere"], ["nowhere: no such run folder"]),
    (["report", "tiny"], ["tiny: is not a run folder"]),
    (["bench"], ["no benchmarks/ folder here"]),
    (["bench", "--tune"], ["no benchmarks/ folder here"]),
]


@pytest.mark.parametrize("argv, words", FLAGS, ids=[" ".join(argv[:4]) for argv, _ in FLAGS])
def test_a_mistyped_command(refused, argv, words):
    refused(argv, *words)


RECIPES = [
    ({"modle": "tiny"}, ["unknown key 'modle'", "did you mean 'model'?"]),
    ({"model": None}, ["model is missing"]),
    ({"model": 3}, ["model must be a name or a path, got 3"]),
    ({"seed": -1}, ["seed must be an integer >= 0, got -1"]),
    ({"stages": []}, ["stages must be a list"]),
    ({"stages": ["prnue"]}, ["item 1", "unknown stage 'prnue'", "did you mean 'prune'?"]),
    ({"stages": [{"prune": {}, "distill": {}}]}, ["item 1: expected one stage's name"]),
    ({"stages": [{"prune": {"taget": 1}}]}, ["stages.prune: unknown key 'taget'", "'target'"]),
    ({"stages": [{"prune": {"target": 3}}]}, ["stages.prune: target must be", "<= 1, got 3"]),
    ({"stages": [{"prune": 0.8}]}, ["stages.prune must be a mapping"]),
    ({"evaluate": {"row": 2}}, ["evaluate: unknown key 'row'", "did you mean 'rows'?"]),
    ({"domain": {"source": "x", "txet": "y"}}, ["domain:", "unknown key 'txet'", "'text'"]),
    ({"domain": {"path": "x"}}, ["domain: expected a name, a path or a mapping with source"]),
]


@pytest.mark.parametrize("change, words", RECIPES, ids=[str(change) for change, _ in RECIPES])
def test_a_fault_in_a_recipe(place, refused, change, words):
    path = workshop.recipe(place, "faulty.yaml", **change)
    refused(["recipe", "check", path], "faulty.yaml", *words)
    refused(["run", path, "--out", "never"], *words)
    assert not (place / "never").exists()


def test_every_fault_of_a_recipe_has_its_line(place, tailor):
    path = workshop.recipe(place, "faulty.yaml", seed="x", stages=[{"prune": {"a": 1, "b": 2}}])
    code, out, err = tailor("recipe", "check", path)
    assert (code, out, err.count("\n")) == (2, "", 3)


def test_yaml_that_is_none(place, refused):
    (place / "bad.yaml").write_text("model: [tiny\nstages: 3")
    refused(["recipe", "check", "bad.yaml"], "bad.yaml, line 2: not valid YAML")
    (place / "bad.yaml").write_text("model: tiny\nmodel: other\n")
    refused(["recipe", "check", "bad.yaml"], "bad.yaml, line 2", "'model' is given twice")
    (place / "bad.yaml").write_text("just words")
    refused(["recipe", "check", "bad.yaml"], "found no mapping")


def test_a_checked_recipe_is_a_recipe_with_all_defaults(place, tailor):
    code, out, _ = tailor("recipe", "check", "recipe.yaml", "--set", "stages.prune.ridge=1e-4")
    plan = yaml.safe_load(out)
    assert code == 0
    assert [next(iter(step)) for step in plan["stages"]] == [
        next(iter(step)) for step in workshop.STAGES
    ]
    assert plan["stages"][1]["prune"]["ridge"] == 1e-4
    assert len(plan["stages"][1]["prune"]) == len(stages.config_type("prune").__dataclass_fields__)
    (place / "resolved.yaml").write_text(out)
    assert tailor("recipe", "check", "resolved.yaml")[1] == out


# --- models and data that cannot be used ----------------------------------------------------------


def test_missing_files(refused):
    refused(stage("evaluate", "nowhere/at/all"), "nowhere/at/all")
    refused(stage("evaluate", domain="domian.txt"), "domian.txt", "did you mean 'domain.txt'?")


def test_data_that_is_empty_or_too_short(place, refused):
    (place / "empty.txt").write_text("\n \n")
    (place / "short.txt").write_text("A few words.\n\nAnd a few more.")
    refused(stage("evaluate", domain="empty.txt"), "empty.txt", "empty")
    refused(stage("evaluate", domain="short.txt"), "short.txt", "less than one sequence of 256")


def test_too_few_calibration_rows_tell_what_was_done(place, tailor):
    few = [*SHORT, "--rows", "1", "--fisher-rows", "1", "--rounding", "32", "--held-out", "0.5"]
    code, out, err = tailor(*stage("prune", "tiny", *few, out="few"))
    assert code == 0, err
    assert re.search("^note: .*(too few|fewer|repair)", err, re.M), err
    assert "->" in out


def test_vocabularies_that_differ(place, refused):
    models.save(tiny("llama", layers=2, vocabulary=288), place / "other")
    argv = stage("distill", "tiny", *SHORT, "--steps", "1", "--teacher", "other")
    refused(argv, "320", "288")
    refused(stage("evaluate", "tiny", *EVALUATE, "--base", "other"), "320", "288")


def test_a_family_that_is_not_known(place, refused):
    config = json.loads((place / "tiny/config.json").read_text())
    shutil.copytree(place / "tiny", place / "gpt2")
    (place / "gpt2/config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    refused(stage("evaluate", "gpt2"), "'gpt2' is not supported", "llama", "qwen3")


@pytest.mark.parametrize("size", [0, 5, 4000, -100])
def test_truncated_weights(place, tmp_path, refused, size):
    shutil.copytree(place / "tiny", tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    os.truncate(weights, size if size >= 0 else weights.stat().st_size + size)
    refused(["generate", tmp_path / "cut", "hello"], "model.safetensors")


def test_damaged_weights(place, tmp_path, refused):
    shutil.copytree(place / "tiny", tmp_path / "bad")
    weights = tmp_path / "bad/model.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**40) + weights.read_bytes()[8:])
    refused(["generate", tmp_path / "bad", "hello"], "model.safetensors")


def test_weights_and_activations_that_are_not_finite(place, tmp_path, refused):
    for name, value in (("nan", float("nan")), ("huge", 3e38)):
        shutil.copytree(place / "tiny", tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.down_proj.weight"][3] = value
        tensors["model.layers.1.mlp.up_proj.weight"] *= 100
        save_file(tensors, path, metadata={"format": "pt"})
    refused(["generate", tmp_path / "nan", "x"], "layers.1.mlp.down_proj", "NaN")
    refused(stage("evaluate", tmp_path / "huge", *EVALUATE), "not finite from block 1")
    refused(stage("prune", tmp_path / "huge", *PRUNE), "block 1")


# --- the disk and the machine ---------------------------------------------------------------------


def test_run_folders_that_cannot_be_used(place, tmp_path, refused):
    (tmp_path / "held").mkdir()
    with open(tmp_path / "held/lock", "w") as lock:
        lock.write("4242\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(["run", "recipe.yaml", "--out", tmp_path / "held"], "in use by process 4242")
    refused(["run", "recipe.yaml", "--out", place], "holds files that are not a run's")
    refused(["run", "recipe.yaml", "--out", place / "domain.txt"], "is a file")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/manifest.json").write_text('{"format": 1')
    refused(["report", tmp_path / "half"], "half-written run folder")
    refused(stage("prune", "tiny", *PRUNE, out=place), "holds files that are not a model's")


@contextlib.contextmanager
def files_of_at_most(size):
    """Let no file grow beyond so many bytes: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_the_middle_of_a_save(place, tmp_path, refused, tailor):
    correct = {**workshop.QUICK, "steps": 1}
    path = workshop.recipe(place, "one.yaml", stages=[{"correct": correct}])
    argv = ["run", path, "--out", tmp_path / "full"]
    with files_of_at_most(300_000):  # less than the model's weights
        refused(argv, "the disk is full", "--debug", code=1)
    assert not (tmp_path / "full/1-correct").exists()
    assert tailor(*argv)[0] == 0  # and with space again it goes on
    assert (tmp_path / "full/1-correct/model/model.safetensors").exists()
    with files_of_at_most(250_000):
        refused(stage("prune", "tiny", *PRUNE, out="lost"), "the disk is full", code=1)
    assert not (place / "lost").exists()


def test_a_full_disk_under_a_checkpoint(tmp_path):
    with runs.RunFolder(tmp_path / "run") as folder:
        folder.begin("1-correct", {})
        folder.save_checkpoint("1-correct", {"w": torch.zeros(10)})
        with files_of_at_most(50_000), pytest.raises(TailorError, match="the disk is full"):
            folder.save_checkpoint("1-correct", {"w": torch.zeros(100_000)})
        assert folder.load_checkpoint("1-correct")["w"].shape == (10,)


def test_a_backend_that_is_missing(monkeypatch, refused):
    monkeypatch.setenv("TAILOR_BACKEND", "cuda")
    reason = unavailable("cuda")  # not built, or no GPU
    if reason:
        refused(["ops"], "backend 'cuda' was asked for", reason)
    monkeypatch.setenv("TAILOR_BACKEND", "cpu.avx3")
    refused(["ops"], "unknown; the backends are")
    monkeypatch.setenv("TAILOR_BACKEND", "cpu.amx")
    if unavailable("cpu.amx"):
        refused(stage("prune", "tiny", *PRUNE), "backend 'cpu.amx' was asked for")


def test_our_own_errors(monkeypatch, refused, tailor):
    def broken(*arguments, **named):
        raise ZeroDivisionError("of all\nthings")

    monkeypatch.setattr(models, "load", broken)
    refused(["generate", "tiny", "x"], "ZeroDivisionError: of all things", "--debug", code=1)
    with pytest.raises(ZeroDivisionError):
        tailor("--debug", "generate", "tiny", "x")


# --- commands that work ---------------------------------------------------------------------------


def test_stages_one_after_the_other(place, tailor):
    quick = [*SHORT, "--batch-size", "2", "--steps", "2", "--validation-rows", "2"]
    for argv in (
        stage("correct", "tiny", *quick, out="corrected"),
        stage("prune", "corrected", *PRUNE, out="pruned"),
        stage("distill", "pruned", *quick, "--teacher", "corrected", out="distilled"),
        stage("specialize", "distilled", *quick, out="special"),
        stage("quantize", "special", *SHORT, "--rows", "4", "--bits", "8", out="small"),
        stage("evaluate", "small", *EVALUATE, "--base", "tiny", out="small.json"),
    ):
        code, out, err = tailor(*argv)
        assert code == 0, err
        assert out and "Traceback" not in err
    assert "domain_perplexity" in out
    assert json.loads((place / "pruned/report.json").read_text())["stage"] == "prune"
    assert json.loads((place / "small.json").read_text())["metrics"]["domain_kl_to_base"] > 0
    code, out, _ = tailor("generate", "small", "The list", "--tokens", "4", "--raw")
    small = models.load(str(place / "small"))  # may well answer with spaces: it is random
    expected = answer(small, small.tokenizer("The list")["input_ids"], 4)
    assert code == 0 and out.strip() == expected
    code, out, _ = tailor("generate", "small", "The list", "--tokens", "4", "--temperature", "1")
    assert code == 0


def test_a_run_prints_one_line_a_stage(place, tmp_path, tailor):
    path = workshop.recipe(place, "brief.yaml", stages=workshop.STAGES[:2])
    code, out, _ = tailor("run", path, "--out", tmp_path / "run")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["0-base", "1-correct", "2-prune", "report:"]
    code, out, _ = tailor("report", tmp_path / "run")
    assert (code, out.strip()) == (0, str(tmp_path / "run/report.html"))
    assert tailor("generate", tmp_path / "run", "The", "--tokens", "2")[0] == 0


def test_a_corpus_that_the_model_writes(place, tailor):
    small = ["--tokens", "200", "--batch", "4", "--max-tokens", "70", "--dtype", "float32"]
    easy = ["--min-tokens", "8", "--min-distinct", "0", "--free-share", "1"]
    code, out, err = tailor("corpus", "tiny", "--out", "written.jsonl", *small, *easy)
    if code == 2:  # a random model's bytes are rarely text: the filter's one line will do
        assert "nothing usable" in err
    else:
        assert code == 0 and "documents" in out, err


def test_the_table_of_ops(tailor):
    from tailor_engine.ops import BACKENDS, OPS

    code, out, _ = tailor("ops", "--json")
    told = json.loads(out)
    assert code == 0 and told["ops"].keys() == OPS.keys()
    for name, entry in told["ops"].items():
        assert entry["backends"].keys() == set(BACKENDS)
        assert entry["backends"][entry["chosen"]]["available"], name
        assert all(
            state["available"] == (not state["reason"]) for state in entry["backends"].values()
        )
    code, out, _ = tailor("ops")
    for name in OPS:
        assert re.search(rf"^{name} .*chosen", out, re.M), out
    assert "[1] " in out


def test_the_help_does_not_wait_for_torch():
    for argv in (["--help"], ["--version"]):
        script = (
            f"import sys; from tailor_engine import cli\ntry:\n    code = cli.main({argv!r})\n"
            "except SystemExit as end:\n    code = end.code\n"
            "assert not code and 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.strip()
    assert __version__ in ended.stdout


def test_every_flag_of_a_stage_is_in_its_help(capsys):
    for name in stages.names():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        told = capsys.readouterr().out
        for key in stages.config_type(name).__dataclass_fields__:
            assert key.replace("_", "-") in told, (name, key)


def test_the_embedded_recipe_is_whole():
    recipe = recipes.load("demo")
    names = [name for name, _ in recipe.stages]
    assert names == ["correct", "prune", "distill", "specialize", "quantize"]
