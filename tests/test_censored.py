"""Rare words come back where a text has a mark in their place."""

import pytest

from benchmarks import censored
from tailor_engine.data import Corpus, Document
from tests.tiny import SENTENCES, tiny

MARKED = [sentence.replace(" the", censored.MARK) for sentence in SENTENCES]


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    monkeypatch.setenv("TAILOR_CACHE", str(tmp_path))
    pools = {"train": MARKED[:6], "validation": MARKED[6:], "test": ["an <unk> that stays"]}
    documents = {split: [Document(text) for text in texts] for split, texts in pools.items()}
    return Corpus.from_splits("marked", documents)


def texts(corpus, splits=censored.FITTED):
    return [document.text for split in splits for document in corpus.splits[split]]


def test_every_mark_becomes_a_word_that_the_corpus_lacks(corpus):
    found = censored.restored(tiny("llama"), corpus)
    known = set(" ".join(texts(corpus)).split())
    drawn = 0
    for before, after in zip(texts(corpus), texts(found), strict=True):
        assert len(before.split()) == len(after.split())
        for old, new in zip(before.split(), after.split(), strict=True):
            assert (old == new) == (old != censored.MARK.strip())
            drawn += old != new
            assert old == new or new not in known
    assert drawn == " ".join(texts(corpus)).count(censored.MARK) > 0
    assert found.splits["test"] == corpus.splits["test"]


def test_the_words_are_drawn_once(corpus, monkeypatch):
    model = tiny("llama")
    first = censored.restored(model, corpus)
    monkeypatch.delattr(censored, "_restored")
    assert texts(censored.restored(model, corpus)) == texts(first)


def test_text_without_marks_is_left_alone():
    plain = Corpus.from_documents("plain", [Document(text) for text in SENTENCES])
    assert censored.restored(None, plain) is plain
