"""What the pruning tests share: corpora whose test split cannot be read, and a small config."""

import random

from tailor_engine.data import Corpus, Data, Document
from tests.tiny import SENTENCES

CONFIG = {
    "sequence_length": 32,
    "rows": 48,
    "target": 0.85,
    "rounding": 32,
    "fisher_rows": 8,
    "precision": "float32",
}


class Forbidden(list):
    """A split that must not be looked at."""

    def __iter__(self):
        raise AssertionError("the test split was read")

    __getitem__ = __iter__


def corpora():
    """Two corpora of shuffled words whose test split cannot be read."""
    chance = random.Random(0)
    words = " ".join(SENTENCES).split()

    def corpus(name):
        texts = (" ".join(chance.choices(words, k=60)) for _ in range(300))
        made = Corpus.from_documents(name, [Document(text) for text in texts])
        made.splits["test"] = Forbidden(made.splits["test"])
        return made

    return Data(corpus("domain"), corpus("general"))
