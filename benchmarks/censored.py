"""Text whose rare words stand as `<unk>`: the dense model writes a word in the place of each.

WikiText-2's tokenized files lack 5 % of their words, the rare ones: who fits to them sees no reason
to keep the tokens of rare words, and learns to expect `<unk>`. Every method is given the same text.
"""

import dataclasses
import hashlib

import torch

from tailor_engine.data import Document
from tailor_engine.io import files, measured
from tailor_engine.stages._precision import autocast

MARK = " <unk>"
FITTED = ("train", "calibration", "validation")
SHORTEST = 3  # letters of a word that is written in


def restored(model, corpus, seed=0):
    """Return the corpus with a word of one token, new to it, in the place of each mark.

    Words are drawn from the model's own probabilities, in all splits but test. They are kept in the
    user's cache, for a million characters take five minutes.
    """
    texts = [document.text for split in FITTED for document in corpus.splits[split]]
    if not any(MARK in text for text in texts):
        return corpus
    asked = hashlib.sha256("\0".join([model.source, str(seed), *texts]).encode()).hexdigest()
    path = measured.folder() / f"restored-{asked[:16]}.json"
    if not path.exists():
        words = _new_words(model.tokenizer, texts)
        generator = torch.Generator().manual_seed(seed)
        filled = (
            "".join(_restored(model, part, words, generator) for part in passages(text))
            for text in texts
        )
        files.atomic_write_json(path, list(filled))
    found = iter(files.read_json(path))
    filled = {split: [Document(next(found)) for _ in corpus.splits[split]] for split in FITTED}
    return dataclasses.replace(corpus, splits=corpus.splits | filled)


def passages(text, size=2000):
    """Yield whole lines gathered until they hold `size` characters."""
    gathered = ""
    for one in text.splitlines(True):
        gathered += one
        if len(gathered) >= size:
            yield gathered
            gathered = ""
    if gathered:
        yield gathered


def _new_words(tokenizer, texts):
    """Return the ids of tokens that are whole words, and stand in none of the texts."""
    known = {word for text in texts for word in text.split()}
    tokens = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    return torch.tensor(
        [
            index
            for index, token in enumerate(tokens)
            if token.startswith(" ")
            and token[1:].isascii()
            and token[1:].isalpha()
            and len(token) > SHORTEST
            and token[1:] not in known
        ]
    )


@torch.inference_mode()
def _restored(model, text, words, generator):
    tokenizer = model.tokenizer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded.offset_mapping]
    places = [i for i, start in enumerate(starts) if text.startswith(MARK, start)]
    if not places:
        return text
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = torch.tensor([[first, *encoded.input_ids]])  # what predicts a token stands at its place
    with autocast(model.device, "auto"):
        states = model.family.body_of(model.network)(input_ids=ids, use_cache=False)
    head = model.family.head_weight(model.network)[words]
    odds = torch.softmax(states.last_hidden_state[0, places].float() @ head.T, -1)
    drawn = words[torch.multinomial(odds, 1, generator=generator)[:, 0]].tolist()
    filled, end = "", 0
    for place, word in zip(places, drawn, strict=True):
        filled += text[end : starts[place]] + tokenizer.decode([word])
        end = starts[place] + len(MARK)
    return filled + text[end:]
