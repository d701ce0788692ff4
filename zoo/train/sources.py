"""Where documents come from: corpora, datasets of the Hub or of files, generated tasks; all read in one way."""

import dataclasses
import hashlib
import json
import reprlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.errors import unknown_name
from zoo.tasks import Example, load_task
from zoo.train.config import SourceSection
from zoo.train.corpora import read_corpus

Document = str | np.ndarray | Example
"""Text, token ids, or the words of a task with what shall be predicted after each."""

_BATCH = 256  # documents that are read, and later tokenised, together


class Piece(NamedTuple):
    """Documents that stand behind each other in a source."""

    documents: list[Document]
    resume: Any
    """What `Source.read` takes to go on behind them; made of what JSON knows."""


@dataclass(frozen=True)
class Source:
    """The documents of one source to train on, in order, and those that are held out."""

    name: str
    fingerprint: str
    """Changes when the documents do."""
    read: Callable[[Any], Iterator[Piece]]
    """From the beginning for None, else from where the `resume` of a piece says. Raises ValueError, which names the
    source, where it cannot be read on."""
    held_out: Callable[[], dict[str, list[Document]]]
    """By the name of a validation set, documents that `read` never gives."""
    words: tuple[str, ...] = ()
    """All words of a task; none where documents are texts."""

    @property
    def is_task(self) -> bool:
        return bool(self.words)


def open_source(name: str, section: SourceSection, seed: int) -> Source:
    """Open what a recipe names, without reading it yet.

    Args:
        name: its name in the recipe.
        section: what the recipe says of it.
        seed: of a task's examples.

    Raises:
        ValueError: if there is no such corpus, dataset or task, or it has no such column.
    """
    if section.corpus:
        return _open_corpus(name, section)
    if section.task:
        return _open_task(name, section, seed)
    return _open_dataset(name, section)


def texts_of(source: Source) -> Iterator[str]:
    """The text of each document, or the words of a task, for training a tokenizer.

    Raises:
        ValueError: if the documents are token ids already.
    """
    if source.is_task:
        yield " ".join(source.words)
        return
    for piece in source.read(None):
        for document in piece.documents:
            if isinstance(document, np.ndarray):
                raise ValueError(f"data.sources.{source.name} holds token ids: name their tokenizer in data.tokenizer")
            yield document


def _fingerprint(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _open_corpus(name: str, section: SourceSection) -> Source:
    corpus = read_corpus(section.corpus)
    documents = corpus.documents[: section.limit]

    def read(resume: int | None) -> Iterator[Piece]:
        for start in range(resume or 0, len(documents), _BATCH):
            piece = documents[start : start + _BATCH]
            yield Piece(piece, start + len(piece))

    return Source(
        name,
        _fingerprint("corpus", corpus.sha256, section.limit),
        read,
        lambda: {held_out: [text] for held_out, text in corpus.held_out.items()},
    )


def _open_task(name: str, section: SourceSection, seed: int) -> Source:
    task, options = load_task(section.task), section.options
    task.options(**options)  # an error in them shall not wait for the first example

    def read(resume: int | None) -> Iterator[Piece]:
        start = resume or 0
        stream = islice(task.generate("train", seed, start=start, **options), _less(section.limit, start))
        while piece := list(islice(stream, _BATCH)):
            start += len(piece)
            yield Piece(piece, start)

    def held_out() -> dict[str, list[Document]]:
        if not section.held_out:
            return {}
        return {name: list(islice(task.generate("test", seed, **options), section.held_out))}

    return Source(
        name,
        _fingerprint("task", section.task, section.options, section.limit, seed),
        read,
        held_out,
        words=tuple(task.vocabulary(**options)),
    )


def _less(limit: int | None, taken: int) -> int | None:
    return None if limit is None else limit - taken


def _fingerprints(files: Any) -> list[Any]:
    """Of files of this machine a hash of each; of others what `datasets` knows of them: repository and commit."""
    found = []
    for path, origin in zip(files, files.origin_metadata, strict=True):
        if Path(path).is_file():
            with Path(path).open("rb") as file:
                origin = hashlib.file_digest(file, "sha256").hexdigest()
        found.append(origin)
    return found


def _document(value: Any, source: str) -> Document:
    if isinstance(value, list) and all(type(i) is int for i in value):
        return np.asarray(value, dtype=np.int64)
    if not isinstance(value, str):
        raise ValueError(f"data.sources.{source}: a document is {reprlib.repr(value)}, wanted text or token ids")
    return value


@contextmanager
def _reading(source: str, dataset: str) -> Iterator[None]:
    """Have what `datasets` raises name the source, and the file if it was in one."""
    try:
        yield
    except Exception as error:  # formats, compressions and networks have errors of many types
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        # Builders read one file after the other in this method, and their errors do not say which.
        files = [frame.f_locals.get("file") for frame in frames if frame.f_code.co_name == "_generate_tables"]
        what = next(filter(None, files), dataset)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data.sources.{source}: cannot read {what!r}: {reason}") from error


_NOT_CONTENT = ("weight", "streaming", "files", "revision")
"""Keys of a section that do not say, or not by themselves, what the documents are."""


def _open_dataset(name: str, section: SourceSection) -> Source:
    import datasets  # noqa: PLC0415 (slow to import, and a corpus does not need it)

    def documents(rows: Any) -> list[Document]:
        return [_document(value, name) for value in rows[section.column]]

    first = None
    with _reading(name, section.dataset), suppress(StopIteration):  # of files without a line
        builder = datasets.load_dataset_builder(
            section.dataset, section.config, data_files=list(section.files) or None, revision=section.revision
        )
        stream = builder.as_streaming_dataset(split=section.split)
        first = next(iter(stream), None)
    if first is None:
        raise ValueError(f"data.sources.{name}: split {section.split!r} of {section.dataset!r} is empty")
    if section.column not in first:
        raise unknown_name(f"column of data.sources.{name}", section.column, first)
    documents({section.column: [first[section.column]]})  # an error in the first shall not wait
    files = {split: _fingerprints(found) for split, found in (builder.config.data_files or {}).items()}
    facts = {key: value for key, value in dataclasses.asdict(section).items() if key not in _NOT_CONTENT}

    def batches(stream: Any) -> Iterator[dict[str, list[Any]]]:
        with _reading(name, section.dataset):
            yield from stream.iter(batch_size=_BATCH)

    def read(resume: dict[str, Any] | None) -> Iterator[Piece]:
        stream = builder.as_streaming_dataset(split=section.split).skip(section.held_out)
        taken = 0
        if resume is not None:
            taken = resume["taken"]
            stream.load_state_dict(resume["stream"])
        for rows in batches(stream):
            piece = documents(rows)
            if section.limit is not None:
                piece = piece[: section.limit - taken]
            if not piece:
                return
            taken += len(piece)
            yield Piece(piece, {"taken": taken, "stream": stream.state_dict()})

    def held_out() -> dict[str, list[Document]]:
        if not section.held_out:
            return {}
        stream = builder.as_streaming_dataset(split=section.split).take(section.held_out)
        return {name: [document for rows in batches(stream) for document in documents(rows)]}

    return Source(name, _fingerprint("dataset", facts, files), read, held_out)
