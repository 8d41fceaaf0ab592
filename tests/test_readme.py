"""README's examples run, and its generated parts are in step."""

import re
from pathlib import Path

import tailor_engine
from benchmarks import readme
from tailor_engine.data import Corpus, Document
from tests.tiny import SENTENCES, tiny

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_examples_run_as_written(tmp_path, monkeypatch, capsys):
    """On a tiny model in place of the packaged one, whose download is 98 MB."""

    def corpus(name):
        texts = (f"{name} {i}. " + " ".join(SENTENCES) for i in range(300))
        return Corpus.from_documents(name, [Document(text) for text in texts])

    monkeypatch.setattr(tailor_engine, "load", lambda source: tiny("llama"), raising=False)
    monkeypatch.setattr(tailor_engine, "load_corpus", corpus, raising=False)
    monkeypatch.chdir(tmp_path)
    space = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert (tmp_path / "pruned/model.safetensors").exists()
    assert "->" in capsys.readouterr().out


def test_generated_parts_are_in_step():
    assert readme.fill(TEXT) == TEXT, "run `python -m benchmarks.readme`"
    assert readme.ALL.read_text() == readme.everything(), "run `python -m benchmarks.readme`"
