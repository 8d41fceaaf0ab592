"""Fewer tokens: the rebuilt tokenizer writes any text, and the network agrees with it."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tailor_engine.data import Corpus, Data, Document
from tailor_engine.errors import UserError
from tailor_engine.io.models import save
from tailor_engine.stages import get
from tailor_engine.stages._vocabulary import bpe
from tailor_engine.stages.vocabulary import vocabulary
from tests.pruning import corpora
from tests.tiny import FAMILIES, SENTENCES, tiny, tiny_tokenizer

SIZE = 420
SMALL = {"tokens": 352, "rounding": 32, "rows": 16, "sequence_length": 32}


@pytest.fixture(scope="module")
def data():
    return corpora()


def texts(count=300):
    """Random unicode: letters, control characters, white space, emoji with joiners, all planes."""
    chance = random.Random(0)
    ranges = [(0, 0x20), (0x20, 0x7F), (0x80, 0xD800), (0xE000, 0x110000), (0x1F300, 0x1F700)]
    pieces = ["\u200d", "\ufe0f", "  ", "\r\n", "\t", "e\u0301", "the ", " return", "\u2581"]
    for _ in range(count):
        points = [chr(chance.randrange(*chance.choice(ranges))) for _ in range(8)]
        words = chance.choices(pieces, k=4) + chance.choices(SENTENCES, k=1)
        mixed = points + words
        chance.shuffle(mixed)
        yield "".join(mixed)


def sentencepiece():
    """Return a tokenizer as Llama 2's and Gemma's are converted: bytes, and every pair a merge."""
    words = sorted({"\u2581" + word for text in SENTENCES for word in text.split()})
    tokens = ["<unk>", "<s>", "</s>", "<pad>"] + [f"<0x{i:02X}>" for i in range(256)]
    pieces = {w[i:j] for w in words for i in range(len(w)) for j in range(i + 1, len(w) + 1)}
    tokens += sorted(pieces, key=lambda t: (len(t), t))[: SIZE - len(tokens)]
    ids = {text: i for i, text in enumerate(tokens)}
    pairs = [(t[:i], t[i:]) for t in tokens[260:] for i in range(1, len(t))]
    merges = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    model = models.BPE(
        vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def whole_words():
    """Return a tokenizer as Llama 3's is: a word that is a token needs no merges to get there."""
    described = json.loads(tiny_tokenizer(SIZE - 1).backend_tokenizer.to_str())
    described["model"]["ignore_merges"] = True
    described["model"]["vocab"]["\u0120zyx"] = SIZE - 1  # no merge makes it
    return Tokenizer.from_str(json.dumps(described))


def with_tokenizer(model, backend):
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = model.tokenizer.chat_template
    for settings in (model.config, model.network.generation_config):
        settings.bos_token_id, settings.pad_token_id = made.bos_token_id, made.pad_token_id
        settings.eos_token_id = [made.eos_token_id, made.bos_token_id]
    return model.replace(tokenizer=made)


def kinds():
    """Return {name: Model}: every kind of tokenizer, tied and untied heads."""
    return {
        "bytes": tiny("llama", vocabulary=SIZE, layers=1),
        "untied": tiny("qwen3", vocabulary=SIZE, layers=1),
        "scaled": with_tokenizer(tiny("gemma3", vocabulary=SIZE, layers=1), sentencepiece()),
        "words": with_tokenizer(tiny("mistral", vocabulary=SIZE, layers=1), whole_words()),
    }


@pytest.fixture(scope="module")
def cut(data):
    """Return {name: (model, cut model, report)}."""
    return {name: (model, *vocabulary(model, SMALL, data)) for name, model in kinds().items()}


def ids(tokenizer):
    return tokenizer.get_vocab()


def test_any_text_is_written_as_before(cut):
    for before, after, _ in cut.values():
        for text in texts():
            encoded = after.tokenizer(text)["input_ids"]
            assert max(encoded) < SMALL["tokens"]
            old = before.tokenizer(text)["input_ids"]
            written = after.tokenizer.decode(encoded, skip_special_tokens=True)
            assert written == before.tokenizer.decode(old, skip_special_tokens=True)
            if "\u2581" not in text:
                assert written == text


def test_every_kept_token_is_still_made_of_its_text(cut):
    for before, after, _ in cut.values():
        old, new = ids(before.tokenizer), ids(after.tokenizer)
        assert sorted(new.values()) == list(range(SMALL["tokens"]))
        for text in SENTENCES:
            names = before.tokenizer.tokenize(text)
            if all(name in new for name in names):
                assert after.tokenizer.tokenize(text) == names
        pieces = bpe.parts(json.loads(before.tokenizer.backend_tokenizer.to_str()))
        kept = {old[name] for name in new}
        assert all(part in kept for index in kept for part in pieces.get(index, ()))


def test_the_network_scores_kept_tokens_as_before(cut):
    for before, after, report in cut.values():
        old, new = ids(before.tokenizer), ids(after.tokenizer)
        order = torch.tensor([old[name] for name in sorted(new, key=new.get)])
        here = torch.randint(0, SMALL["tokens"], (2, 20))
        with torch.no_grad():
            got = after.network(here).logits
            expected = before.network(order[here]).logits[..., order]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert after.family.tied(after.network) == before.family.tied(before.network)
        removed = (SIZE - SMALL["tokens"]) * 64 * (1 if after.family.tied(after.network) else 2)
        assert report.parameters_before - report.parameters_after == removed


def test_special_tokens_and_template_go_on_working(cut):
    for before, after, _ in cut.values():
        new = after.tokenizer
        for settings in (after.config, after.network.generation_config):
            assert settings.pad_token_id == new.pad_token_id
            assert settings.bos_token_id == new.bos_token_id
            ends = settings.eos_token_id
            assert (ends[0] if isinstance(ends, list) else ends) == new.eos_token_id
        assert after.config.vocab_size == SMALL["tokens"]
        body = after.family.body_of(after.network)
        assert body.padding_idx == body.embed_tokens.padding_idx == new.pad_token_id
        chat = [{"role": "user", "content": "the list"}]
        shown = [m.tokenizer.apply_chat_template(chat, tokenize=False) for m in (before, after)]
        assert shown[0] == shown[1]
        first = new.decode(new("the")["input_ids"][0])
        assert first == before.tokenizer.decode(before.tokenizer("the")["input_ids"][0])


RELOAD = """
import json, sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
result = {}
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(open(f"{sys.argv[1]}/text").read(), return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        result[name] = ids, model(ids).logits
torch.save(result, f"{sys.argv[1]}/result")
assert "tailor_engine" not in sys.modules
"""


def test_stock_transformers_reads_all_of_it_in_a_new_process(cut, tmp_path):
    text = "".join(texts(2))
    (tmp_path / "text").write_text(text, newline="")
    for name, (_, after, _) in cut.items():
        save(after, tmp_path / name)
    command = [sys.executable, "-c", RELOAD, str(tmp_path), *cut]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ, timeout=300)
    text = (tmp_path / "text").read_text()
    for name, (found, logits) in torch.load(tmp_path / "result").items():
        after = cut[name][1]
        assert found.tolist() == [after.tokenizer(text)["input_ids"]]
        with torch.inference_mode():
            torch.testing.assert_close(logits, after.network(found).logits, atol=1e-5, rtol=1e-5)


def test_use_decides_and_parts_inherit(data):
    counts = torch.zeros(8).numpy()
    counts[[4, 5, 6, 7]] = (
        3.0,
        2.0,
        1.0,
        5.0,
    )  # 0 to 3 are bytes, 4 = 0+1, 5 = 2+3, 6 = 4+5, 7 = 1+1
    pieces = {0: (), 1: (), 2: (), 3: (), 4: (0, 1), 5: (2, 3), 6: (4, 5), 7: (1, 1)}
    for size, expected in ((7, {4, 5, 7}), (6, {4, 7}), (5, {7})):
        kept = bpe.choose(counts, pieces, {0, 1, 2, 3}, size)
        assert kept == {0, 1, 2, 3} | expected
    counts[6] = 9.0  # used most, so its parts stay with it
    assert bpe.choose(counts, pieces, {0, 1, 2, 3}, 7) == {0, 1, 2, 3, 4, 5, 6}
    model = tiny("llama", vocabulary=SIZE, layers=1)
    report = vocabulary(model, SMALL, data)[1]
    for name in ("domain", "general"):
        before, after = (
            report.metrics[f"{name}_tokens_per_character_{when}"] for when in ("before", "after")
        )
        assert before < after < 2 * before


@pytest.mark.parametrize("family_name", FAMILIES)
def test_everything_kept_changes_nothing(data, family_name):
    model = tiny(family_name, vocabulary=SIZE, layers=1)
    same, _ = vocabulary(model, SMALL | {"tokens": SIZE}, data)
    assert ids(same.tokenizer) == ids(model.tokenizer)
    state = same.network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.network.state_dict().items())


def test_later_stages_and_the_teacher_speak_the_new_tokens(data):
    dense = tiny("llama", vocabulary=SIZE, layers=2)
    small = {"sequence_length": 32, "rows": 24, "target": 0.9, "rounding": 32, "preset": "fast"}
    quick = {"sequence_length": 32, "batch_size": 2, "steps": 2, "validation_rows": 2}
    measured = {"rows": 2, "sequence_length": 32, "new_tokens": 0, "split": "validation"}
    pruned, _ = get("prune")(dense, small, data)
    model, _ = vocabulary(pruned, SMALL, data)
    assert model.teacher.config.vocab_size == SMALL["tokens"]
    assert dense.config.vocab_size == pruned.config.vocab_size == SIZE
    model, report = get("distill")(model, quick, data)
    assert all(0 <= loss < 10 for loss in report.metrics["loss"])
    metrics = get("evaluate")(model, measured, data)[1].metrics
    assert metrics["domain_bits_per_byte"] > 0 and "domain_kl_to_base" not in metrics


def test_one_document_is_enough():
    corpus = Corpus.from_documents("one", [Document(" ".join(SENTENCES) * 9)], {"train": 1.0})
    model = tiny("llama", vocabulary=SIZE, layers=1)
    after, report = vocabulary(model, SMALL, Data(corpus))
    assert after.config.vocab_size == report.metrics["tokens_after"] == SMALL["tokens"]
    assert not any("character" in key for key in report.metrics)  # no text to judge by


def test_bad_input_is_one_line(data):
    model = tiny("llama", vocabulary=SIZE, layers=1)
    cases = [
        ({"tokens": 64}, "64 tokens are too few; bytes and special tokens are 262"),
        ({"tokens": 4096}, "tokens must be <= 420, got 4096"),
        ({"share": 2.0}, "share must be"),
        ({"token": 300}, "did you mean 'tokens'"),
    ]
    for config, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            vocabulary(model, SMALL | config, data)
        assert "\n" not in str(caught.value)
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    other = model.replace(
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="a")
    )
    with pytest.raises(UserError, match="the tokenizer is a Unigram model; only byte-pair"):
        vocabulary(other, SMALL, data)
    packed, _ = get("quantize")(model, {"sequence_length": 32, "rows": 4}, data)
    with pytest.raises(UserError, match="embedding is a QuantizedEmbedding; cut the vocabulary"):
        vocabulary(packed, SMALL, data)
