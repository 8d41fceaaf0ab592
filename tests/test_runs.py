"""Run folders: resumed after any kill, locked, checked, and told in a report."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tailor_engine import cli, pipeline
from tailor_engine.errors import UserError
from tailor_engine.io import files, models, recipes, report, runs
from tests import killer, workshop

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workshop.furnish(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def done(place):
    """Return a finished run of the whole recipe."""
    assert cli.main(["run", str(place / "recipe.yaml"), "--out", str(place / "done")]) == 0
    return place / "done"


@pytest.fixture
def copy(done, tmp_path, monkeypatch):
    """Return a copy of the finished run; pages are not drawn, which would take most of the time."""
    monkeypatch.setattr(report, "write", lambda out: out)
    return Path(shutil.copytree(done, tmp_path / "run"))


def again(place, out, capsys, *extra):
    """Run the recipe once more; return (code, the stages that were done again, stderr)."""
    capsys.readouterr()
    code = cli.main(["run", str(place / "recipe.yaml"), "--out", str(out), *extra])
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if re.match(r"[1-9]-", line)]
    return code, [line.split()[0] for line in lines if " kept " not in line], printed.err


def test_twenty_kills_at_random_moments_end_in_the_same_weights(place, tmp_path):
    command = [sys.executable, "-m", "tests.killer", str(place / "recipe.yaml"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["20", "7"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert len(result["moments"]) == 20
    assert result["files"] == len(workshop.STAGES)
    assert all(result["same"]), result
    assert len({str(moment) for moment in result["moments"]}) > 2, result  # not all in one place


def test_a_run_holds_models_manifests_and_reports(done):
    names = [folder.name for folder in runs.step_folders(done)]
    stages = [next(iter(stage)) for stage in workshop.STAGES]
    assert names == ["0-base", *(f"{i}-{name}" for i, name in enumerate(stages, 1))]
    told = files.read_json(done / "report.json")
    assert [stage["stage"] for stage in told["stages"]] == stages
    wanted = {"domain_perplexity", "general_perplexity", "parameters", "size_bytes"}
    assert wanted <= told["base"]["metrics"].keys() & told["final"]["metrics"].keys()
    assert {"stage", "config", "seconds", "metrics"} <= told["stages"][0].keys()
    manifest = files.read_json(done / "manifest.json")
    assert {"versions", "machine", "seed", "model", "data", "recipe"} <= manifest.keys()
    step = files.read_json(done / "2-prune" / "manifest.json")
    assert step["teacher"] == "1-correct"
    assert (
        step["inputs"]["previous"]["outputs"]
        == (files.read_json(done / "1-correct" / "manifest.json")["outputs"])
    )
    assert not [entry for entry in done.iterdir() if entry.name.startswith(".")]


def test_every_model_of_a_run_loads(done):
    for folder in runs.step_folders(done)[1:]:
        models.load(runs.model_path(folder))
    assert runs.model_path(done) == str(done / "5-quantize" / "model")


def test_a_finished_run_is_not_done_again(place, copy, capsys):
    before = killer.weights(copy)
    assert again(place, copy, capsys)[:2] == (0, [])
    assert killer.weights(copy) == before


def test_a_changed_stage_and_all_after_it_are_done_again(place, copy, capsys):
    before = killer.weights(copy)
    code, redone, told = again(place, copy, capsys, "--set", "stages.distill.steps=5")
    assert (code, redone) == (0, ["3-distill", "4-specialize", "5-quantize"])
    assert "note: 3-distill: config.steps was 8, now 5; done again" in told
    assert again(place, copy, capsys)[:2] == (0, redone)
    assert killer.weights(copy) == before


def test_a_shorter_plan_drops_what_is_left_over(place, copy, capsys):
    values = recipes.parse((place / "recipe.yaml").read_text(), "recipe")
    shorter = workshop.recipe(place, "shorter.yaml", stages=values["stages"][:2])
    assert cli.main(["run", shorter, "--out", str(copy)]) == 0
    assert [folder.name for folder in runs.step_folders(copy)][1:] == ["1-correct", "2-prune"]


DAMAGE = {
    "truncated": lambda step: os.truncate(step / "model" / "model.safetensors", 1000),
    "changed": lambda step: (step / "model" / "tokenizer.json").write_bytes(
        (step / "model" / "tokenizer.json").read_bytes().replace(b"e", b"f", 1)
    ),
    "missing": lambda step: (step / "model" / "config.json").unlink(),
    "half-written": lambda step: os.truncate(step / "manifest.json", 50),
    "no manifest": lambda step: (step / "manifest.json").unlink(),
}


def test_damaged_steps_are_told_and_done_again(place, copy, capsys):
    before = killer.weights(copy)
    for what, damage in DAMAGE.items():
        damage(copy / "4-specialize")
        code, redone, told = again(place, copy, capsys)
        assert (code, redone) == (0, ["4-specialize"]), what
        assert len([line for line in told.splitlines() if "done again" in line]) == 1, told
    (copy / "2-prune" / "evaluation.json").write_text("{")
    os.truncate(copy / "report.json", 10)
    code, redone, told = again(place, copy, capsys)
    assert (code, redone) == (0, [])
    assert "2-prune: evaluation.json is damaged; measured again" in told
    assert killer.weights(copy) == before


def test_what_a_killed_writer_left_is_cleared_away(place, copy, capsys):
    (copy / f"{files.TEMPORARY_PREFIX}model-x").mkdir()
    working = copy / f"{runs.WORKING_PREFIX}4-specialize"
    # The kill came between the manifest and the rename: the step is complete but for its name.
    os.rename(copy / "4-specialize", working)
    (working / "checkpoint.pt").write_bytes(b"old")
    assert again(place, copy, capsys)[:2] == (0, [])
    assert not [entry for entry in copy.iterdir() if entry.name.startswith(".")]
    assert not (copy / "4-specialize" / "checkpoint.pt").exists()


class Stopped(Exception):
    """Stands for a kill in the middle of a stage."""


def test_training_goes_on_from_its_checkpoint(place, done, tmp_path, monkeypatch, capsys):
    saved = []
    keep = runs.RunFolder.save_checkpoint

    def stop(self, name, state):
        keep(self, name, state)
        saved.append(state["step"])
        if name == "3-distill" and state["step"] == 4:
            raise Stopped

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "save_checkpoint", stop)
        assert again(place, out, capsys)[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "save_checkpoint", stop)
        saved.clear()
        code, redone, told = again(place, out, capsys)
    assert (code, redone) == (0, ["3-distill", "4-specialize", "5-quantize"])
    assert "went on from the checkpoint of step 4" in told
    assert saved[0] == 5
    assert killer.weights(out) == killer.weights(done)


def test_a_damaged_checkpoint_starts_the_stage_again(place, tmp_path):
    with runs.RunFolder(tmp_path / "run") as folder:
        told = []
        folder.note = told.append
        folder.begin("1-correct", {"a": 1})
        assert folder.load_checkpoint("1-correct") is None
        folder.save_checkpoint("1-correct", {"step": 3, "weights": {"w": torch.ones(2)}})
        assert folder.load_checkpoint("1-correct")["step"] == 3
        folder.begin("1-correct", {"a": 1})
        assert folder.load_checkpoint("1-correct")["step"] == 3
        path = tmp_path / "run" / ".working-1-correct" / "checkpoint.pt"
        os.truncate(path, path.stat().st_size // 2)
        assert folder.load_checkpoint("1-correct") is None
        assert "the checkpoint is damaged" in told[0]
        folder.save_checkpoint("1-correct", {"step": 3})
        folder.begin("1-correct", {"a": 2})  # other inputs: the checkpoint is another stage's
        assert folder.load_checkpoint("1-correct") is None


def test_one_process_at_a_time(tmp_path):
    script = f"""
import time; from pathlib import Path; from tailor_engine.io import runs
with runs.RunFolder(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
            runs.RunFolder(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with runs.RunFolder(tmp_path):  # a dead process holds nothing
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_in_memory_and_in_a_folder_give_the_same_weights(place, done):
    checked = recipes.load(str(place / "recipe.yaml"))
    data = cli_data(checked)
    plan = [{name: vars(config)} for name, config in checked.stages]
    model, told = pipeline.run(
        models.load(checked.model), plan, data, evaluate=False, seed=checked.seed
    )
    kept = models.load(done / "5-quantize" / "model")
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        assert torch.equal(model.network(ids).logits, kept.network(ids).logits)
    assert told["complete"] and told["final"]["metrics"] == {}


def cli_data(checked):
    from tailor_engine.cli import _commands

    return _commands.load_data(checked.domain, checked.general)


class Page(HTMLParser):
    """Collects what a page refers to, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.links, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [values[key] for key in ("src", "href", "xlink:href") if values.get(key)]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_tells_the_run(done):
    text = (done / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert not [link for link in page.links if not link.startswith(("#", "data:image/png"))]
    assert "url(http" not in text and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    pictures = re.findall(r"<svg .*?</svg>", text, re.S)
    assert len(pictures) == 8  # size and quality, cuts, shapes, losses: each wide and narrow
    for picture in pictures:
        assert 'role="img"' in picture and "aria-label=" in picture
        assert not re.search(r"#0[1-7]0[1-7]0[1-7]\b", picture)  # every colour is the page's own
        xml.etree.ElementTree.fromstring(picture)
    told = files.read_json(done / "report.json")
    for metrics in (told["base"]["metrics"], told["final"]["metrics"]):
        assert f"{metrics['domain_perplexity']:.0f}" in text
    for words in ("1-correct", "5-quantize", "learning_rate", "prefers-color-scheme"):
        assert words in text


def test_the_page_escapes_what_models_write(done):
    told = files.read_json(done / "report.json")
    told["complete"], told["stages"] = False, []
    told["final"]["metrics"]["samples"] = [
        {"prompt": "<script>alert(1)</script>", "base": "a & b", "specialist": ""}
    ]
    text = report.page(told, files.read_json(done / "manifest.json"), "<b>")
    assert "<script>" not in text and "&lt;script&gt;" in text and "a &amp; b" in text
    assert "This run is not finished" in text


def test_the_page_of_a_run_without_general_text_or_evaluations(done):
    told = files.read_json(done / "report.json")
    bare = {key: value for key, value in told["base"]["metrics"].items() if "general" not in key}
    told["base"]["metrics"], told["stages"] = bare, []
    told["final"] = {"metrics": bare}
    assert "General text" not in report.page(told, files.read_json(done / "manifest.json"), "x")
    told["base"]["metrics"] = told["final"]["metrics"] = {}
    assert "A specialist for" in report.page(told, files.read_json(done / "manifest.json"), "x")
