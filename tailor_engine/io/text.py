"""Data sources: embedded corpora, local files and folders, and the Hugging Face hub.

`load_corpus` turns any of them into a `Corpus`. Rows of a table become documents through a column
map; a prompt with an answer, or a list of messages, is rendered by the model's chat template later
and carries loss on the answers only.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tailor_engine.data import EMBEDDED_FRACTIONS, FRACTIONS, SPLITS, Corpus, Document
from tailor_engine.errors import UserError
from tailor_engine.io.files import atomic_write_bytes, atomic_write_json
from tailor_engine.io.python_docs import python_docs, python_docs_recipe
from tailor_engine.io.tables import TABLES, Row, read_table, read_text

EMBEDDED = ("python-docs", "self-written")
TEXTS = (".txt", ".md", ".rst")
ASSET, ASSET_RECIPE = "self_written.jsonl.xz", "self_written.recipe.json"

# Column names that are recognised without a map, tried in this order.
KNOWN_COLUMNS: tuple[dict[str, str], ...] = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "prompt", "answer": "answer"},
    {"prompt": "prompt", "answer": "completion"},
    {"prompt": "prompt", "answer": "response"},
    {"prompt": "question", "answer": "answer"},
    {"prompt": "instruction", "answer": "output"},
    {"prompt": "instruction", "answer": "response"},
    {"text": "text"},
    {"text": "content"},
)


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; the defaults suit tables with the usual column names."""

    text: str | None = None  # column with running text
    prompt: str | None = None  # column with the prompt; needs `answer`
    answer: str | None = None  # column with the answer, which alone carries loss
    messages: str | None = None  # column with a list of {"role", "content"}
    calibration: str | None = None  # separate file or folder of this split
    validation: str | None = None  # separate file or folder of this split
    test: str | None = None  # separate file or folder of this split
    fractions: Mapping[str, float] | None = None  # of the splits that have no file of their own
    limit: int | None = None  # read at most this many documents of each source
    passage: int = 2000  # characters; a single text file is cut into passages of about this size
    hub_config: str | None = None  # configuration of a hub data set
    hub_split: str = "train"  # split of a hub data set that is read
    name: str | None = None  # of the corpus; the source by default


def load_corpus(source: str, options: SourceOptions | None = None) -> Corpus:
    """Read a data source and split it once.

    `source` is "python-docs" or "self-written" (embedded), a file (.jsonl, .json, .csv, .tsv,
    .parquet, .txt, .md, .rst), a folder of such files, or a Hugging Face data set id
    ("owner/name", or "hub:name"). In a folder each text file is one document; a single text file is
    cut into passages at blank lines.

    Raises: UserError with one line for whatever is missing, empty, damaged or unknown.
    """
    options = options or SourceOptions()
    pools: dict[str, Iterable[Document]] = {"train": read_source(source, options)}
    for split in SPLITS[1:]:
        separate = getattr(options, split)
        if separate is not None:
            pools[split] = read_source(separate, options)
    default = EMBEDDED_FRACTIONS if source in EMBEDDED else FRACTIONS
    corpus = Corpus.from_splits(options.name or source, pools, options.fractions or default)
    corpus.recipe = _recipe(source)
    return corpus


def read_source(source: str, options: SourceOptions) -> list[Document]:
    """All documents of one source, unsplit.

    Raises: UserError as `load_corpus`, and for an empty source.
    """
    if options.passage < 1 or (options.limit is not None and options.limit < 1):
        raise UserError(
            f"{source}: passage and limit must be 1 or more, got {options.passage}, {options.limit}"
        )
    path = Path(source).expanduser()
    documents: Iterable[Document]
    if source == "python-docs":
        documents = python_docs()
    elif source == "self-written":
        documents = (Document(row["text"]) for row in _self_written())
    elif path.is_dir():
        documents = _folder(path, options)
    elif path.is_file():
        documents = _file(path, options, options.passage)
    elif source.startswith("hub:") or _looks_like_hub_id(source):
        documents = documents_of(_hub_rows(source.removeprefix("hub:"), options), options, source)
    else:
        raise UserError(_missing(source, path))
    result = list(islice(documents, options.limit))
    if not any(document.text.strip() for document in result):
        raise UserError(f"{source}: the data set is empty, no document with any text in it")
    return result


def documents_of(rows: Iterable[Row], options: SourceOptions, where: str) -> Iterable[Document]:
    """Turn rows of a table (dicts; a `datasets.Dataset` will do) into documents.

    Raises: UserError for a column that is not there, naming the nearest one that is, or for a
        value of the wrong kind, naming the row.
    """
    columns: dict[str, str] | None = None
    for number, row in enumerate(rows, 1):
        if columns is None:
            columns = _columns(row, options, where)
        yield _document(row, columns, f"{where}, row {number}")


def save_self_written(
    documents: list[str], recipe: dict[str, Any], path: str | Path, licence: str = ""
) -> None:
    """Write model-written text as compressed JSONL, and its recipe as JSON beside it.

    Raises: TailorError where the disk refuses.
    """
    path = Path(path)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    packed = lines.encode()
    if path.suffix == ".xz":
        packed = lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME)
    atomic_write_bytes(path, packed)
    beside = path.with_name(path.name.split(".")[0] + ".recipe.json")
    atomic_write_json(beside, {**recipe, "licence": licence} if licence else recipe)


def _self_written() -> list[dict[str, str]]:
    text = lzma.decompress(_asset(ASSET)).decode()
    return [json.loads(line) for line in text.split("\n") if line]


def _asset(name: str) -> bytes:
    return files("tailor_engine").joinpath("assets", name).read_bytes()


def _recipe(source: str) -> dict[str, Any]:
    if source == "python-docs":
        return dict(python_docs_recipe())
    if source == "self-written":
        return dict(json.loads(_asset(ASSET_RECIPE)))
    return {"source": source}


def _folder(folder: Path, options: SourceOptions) -> Iterable[Document]:
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _extension(path) in (*TEXTS, *TABLES) and path.name[0] != "."
    ]
    if not paths:
        raise UserError(
            f"{folder}: no file with a known extension in this folder "
            f"({', '.join((*TEXTS, *TABLES))})"
        )
    return chain.from_iterable(_file(path, options, passage=None) for path in paths)


def _file(path: Path, options: SourceOptions, passage: int | None) -> Iterable[Document]:
    extension = _extension(path)
    if extension in TABLES:
        return documents_of(read_table(path, extension), options, str(path))
    if extension not in TEXTS:
        raise UserError(
            f"{path}: unknown extension {extension!r}; known are {', '.join((*TEXTS, *TABLES))}"
        )
    text = read_text(path)
    return map(Document, [text] if passage is None else _passages(text, passage))


def _passages(text: str, size: int) -> Iterable[str]:
    """Paragraphs gathered until they hold `size` characters."""
    gathered: list[str] = []
    held = 0
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        held += len(paragraph)
        if held >= size:
            yield "\n\n".join(gathered).strip("\n")
            gathered, held = [], 0
    if held:
        yield "\n\n".join(gathered).strip("\n")


def _extension(path: Path) -> str:
    """Give the extension in lower case; a compression behind it (.gz, .xz) does not count."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in (".gz", ".xz"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _columns(row: Row, options: SourceOptions, where: str) -> dict[str, str]:
    """Which column plays which part: the user's map, else names that are usual."""
    there = list(row)
    given = {
        part: column
        for part in ("text", "prompt", "answer", "messages")
        if (column := getattr(options, part)) is not None
    }
    for part, column in given.items():
        if column not in row:
            near = get_close_matches(str(column), there, 1, 0.0)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{where}: no column {column!r} for {part}; {hint}there are {there}")
    if given:
        if ("prompt" in given) != ("answer" in given) or len(given) > 1 + ("prompt" in given):
            raise UserError(
                f"{where}: map text=, or messages=, or prompt= together with answer=; got {given}"
            )
        return given
    for known in KNOWN_COLUMNS:
        if all(column in row for column in known.values()):
            return known
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if len(there) == 1 and strings:
        return {"text": strings[0]}
    raise UserError(
        f"{where}: cannot tell which column holds the text; map one with text=, messages=, or "
        f"prompt= and answer=; there are {there}"
    )


def _document(row: Row, columns: dict[str, str], where: str) -> Document:
    values = {}
    for part, column in columns.items():
        if column not in row:
            raise UserError(f"{where}: lacks the column {column!r}")
        values[part] = row[column]
    if "messages" in values:
        return _conversation(values["messages"], where, columns["messages"])
    for part, value in values.items():
        if value is None:
            values[part] = ""
        elif not isinstance(value, str):
            raise UserError(
                f"{where}: column {columns[part]!r} must hold text, got {type(value).__name__}"
            )
    if "text" in values:
        return Document(values["text"])
    if not values["answer"].strip():
        return Document("")  # nothing to learn from; counted as empty
    return Document.from_messages([("user", values["prompt"]), ("assistant", values["answer"])])


def _conversation(value: Any, where: str, column: str) -> Document:
    """Messages in either usual form: role/content, or from/value with human and gpt."""
    try:
        turns = json.loads(value) if isinstance(value, str) else list(value)
        names = {"human": "user", "gpt": "assistant"}
        pairs = []
        for turn in turns:
            role = turn["role"] if "role" in turn else turn["from"]
            content = turn["content"] if "content" in turn else turn["value"]
            if not isinstance(role, str) or not isinstance(content, str):
                raise TypeError
            pairs.append((names.get(role, role), content))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f'{where}: column {column!r} must hold a list of {{"role": ..., "content": ...}}'
        ) from None
    if not any(role == "assistant" for role, _ in pairs):
        raise UserError(f"{where}: no message of role 'assistant', so nothing would carry loss")
    return Document.from_messages(pairs)


def _looks_like_hub_id(source: str) -> bool:
    owner, slash, name = source.partition("/")
    known = Path(source).suffix.lower() in (*TEXTS, *TABLES, ".gz", ".xz")
    return bool(slash and owner and name) and "/" not in name and owner[0] not in ".~" and not known


def _hub_rows(name: str, options: SourceOptions) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(name, options.hub_config, split=options.hub_split)
    except Exception as error:  # the hub's client raises dozens of types; all mean the same here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"data set {name!r} could not be read from the Hugging Face hub: {reason[0]}"
        ) from error


def _missing(source: str, path: Path) -> str:
    here = path.parent if path.parent.is_dir() else Path()
    names = [*EMBEDDED, *(entry.name for entry in here.iterdir())]
    near = get_close_matches(path.name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"data source {source!r} does not exist; {hint}give a file, a folder, a Hugging Face id "
        f"(owner/name), or one of {', '.join(EMBEDDED)}"
    )
