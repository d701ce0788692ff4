"""The data of a run: a tokenizer, the tokenised sources, batches to train on and rows to validate on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from zoo.train.batches import WINDOW, Batches, Stream
from zoo.train.config import DataSection, TrainConfig
from zoo.train.sources import Document, Source, open_source, texts_of
from zoo.train.store import IGNORED, BackgroundFiller, Encoded, EncodedPiece, TokenStore
from zoo.train.tokenizer import (
    TRAINED_ON_THE_SPOT,
    UNKNOWN_WORD,
    count_entries,
    fingerprint_of,
    load_tokenizer,
    trained_tokenizer,
)

_TOKENIZER_TEXT = 50_000_000  # characters that a tokenizer is trained on
_FORMAT = 1  # of the stores; another number leaves those of before alone


@dataclass(frozen=True)
class TrainingData:
    """What a run reads."""

    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    validation: dict[str, TokenStore]
    """By name, text that is never trained on."""
    fingerprints: dict[str, str]
    """By source, a hash of its documents and the tokenizer."""

    @property
    def sha256(self) -> str:
        """A hash of all sources and the tokenizer."""
        return hashlib.sha256(json.dumps(self.fingerprints, sort_keys=True).encode()).hexdigest()

    def close(self) -> None:
        """Stop reading sources in the background."""
        for stream in self.batches.streams:
            if stream.filler is not None:
                stream.filler.close()


def prepare_data(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> TrainingData:
    """Open the sources of a recipe and tokenise them, or find them tokenised.

    Args:
        config: the recipe.
        tokenizer: of the checkpoint that a run goes on from; None: as the recipe says.
        say: takes a line for the user.
        show_progress: whether to show a bar while sources are tokenised.

    Raises:
        ValueError: if a source cannot be read or is empty, or does not go with the tokenizer.
    """
    data, cache = config.data, cache_folder(config.data)
    sources = [open_source(name, section, config.train.seed) for name, section in data.sources.items()]
    tokenizer = tokenizer or _find_tokenizer(data, sources, cache)
    length = data.sequence_length
    streams, fingerprints, validation = [], {}, {}
    for source, section in zip(sources, data.sources.values(), strict=True):
        store = _store(cache, source, tokenizer, length)
        read = partial(_encoded, source, tokenizer)
        fingerprints[source.name] = store.folder.name
        filler, is_streamed = None, section.streaming or source.is_task
        if is_streamed and not store.is_complete:
            filler = BackgroundFiller(store, read, ahead=WINDOW * length)
            filler.wait_for(1)
        elif not store.is_complete:
            _fill(store, read, source.name, show_progress)
        if is_streamed:
            say(f"{source.name}: {store.tokens:,} tokens so far, more as they are needed")
        else:
            say(f"{source.name}: {store.documents:,} documents, {store.tokens:,} tokens in {store.folder}")
        if store.is_complete and store.tokens < 2:
            raise ValueError(f"data.sources.{source.name} is empty: there is nothing to train on")
        streams.append(Stream(store, section.weight, is_streamed, filler))
        for name, documents in source.held_out().items():
            if name in validation:
                raise ValueError(
                    f"two sources hold out a text named {name!r}: name data.sources.{source.name} otherwise"
                )
            validation[name] = _held_out_store(cache, source, tokenizer, length, name, documents)
            if validation[name].tokens < 2:
                raise ValueError(f"data.sources.{source.name}: the text that is held out is empty")
    batches = Batches(
        streams,
        length,
        data.batch_size,
        config.train.seed,
        isolate=data.isolate_documents,
        carry=config.train.carry_state,
        filler=tokenizer.eos_token_id,
    )
    return TrainingData(tokenizer, batches, validation, fingerprints)


def cache_folder(data: DataSection) -> Path:
    """Where tokenised data is kept."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zoo" / "tokens"


def _find_tokenizer(data: DataSection, sources: list[Source], cache: Path) -> PreTrainedTokenizerBase:
    if data.tokenizer not in TRAINED_ON_THE_SPOT:
        return load_tokenizer(data.tokenizer)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".tokenizer.lock"):  # one process trains it, the others find it
        return trained_tokenizer(
            data.tokenizer,
            data.vocab_size,
            _some_of(_in_turn([texts_of(source) for source in sources])),
            cache,
            json.dumps([source.fingerprint for source in sources]),
        )


def _in_turn(sources: list[Iterator[str]]) -> Iterator[str]:
    """A text of each source, then another of each that has one."""
    for texts in zip_longest(*sources):
        yield from (text for text in texts if text is not None)


def _some_of(texts: Iterator[str]) -> Iterator[str]:
    read = 0

    def is_enough(text: str) -> bool:
        nonlocal read
        read += len(text)
        return read < _TOKENIZER_TEXT

    return takewhile(is_enough, texts)


def _store(
    cache: Path, source: Source, tokenizer: PreTrainedTokenizerBase, length: int, held_out: str = ""
) -> TokenStore:
    """Where a source, or its held-out text of a name, is or will be tokenised."""
    row_length = length if source.is_task else None
    facts = json.dumps([_FORMAT, source.fingerprint, fingerprint_of(tokenizer), row_length, held_out])
    key = hashlib.sha256(facts.encode()).hexdigest()[:20]
    dtype = np.dtype(np.uint16 if count_entries(tokenizer) <= 2**16 else np.uint32)
    name = "-".join(filter(None, (source.name, held_out, key)))
    return TokenStore(cache / name, dtype, row_length, tokenizer.eos_token_id)


def _held_out_store(
    cache: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    name: str,
    documents: list[Document],
) -> TokenStore:
    store = _store(cache, source, tokenizer, length, f"held-out-{name}")
    if not store.is_complete:
        encoded = EncodedPiece(_encode(documents, tokenizer, source.name), None)
        _fill(store, lambda resume: iter([encoded]), name, show_progress=False)
    return store


def _fill(store: TokenStore, read: Callable[[Any], Iterator[EncodedPiece]], name: str, show_progress: bool) -> None:
    """Tokenise all of a source, or wait for the process that does."""
    with (
        store.lock(),
        tqdm(desc=f"tokenise {name}", unit="tok", unit_scale=True, disable=not show_progress) as bar,
    ):

        def counted(resume: Any) -> Iterator[EncodedPiece]:
            for piece in read(resume):
                bar.update(sum(len(document.ids) for document in piece.documents))
                yield piece

        for _ in store.append(counted):
            pass


# -- from documents to tokens ------------------------------------------------------------------------------------------


def _encoded(source: Source, tokenizer: PreTrainedTokenizerBase, resume: Any) -> Iterator[EncodedPiece]:
    for piece in source.read(resume):
        yield EncodedPiece(_encode(piece.documents, tokenizer, source.name), piece.resume)


def _encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase, source: str) -> list[Encoded]:
    """Token ids of documents: of text and ids with the end-of-text token in front, of a task's words one a word."""
    if isinstance(documents[0], str):
        return _encode_texts(documents, tokenizer)
    if isinstance(documents[0], np.ndarray):
        return [_checked_ids(ids, tokenizer, source) for ids in documents]
    return [_encode_words(example, tokenizer, source) for example in documents]


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    # A text that spells a special token means these letters; and it may be longer than what a model of old could read.
    rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [Encoded(np.array([end, *ids]), None, len(text.encode())) for ids, text in zip(rows, texts, strict=True)]


def _checked_ids(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, source: str) -> Encoded:
    entries, end = count_entries(tokenizer), tokenizer.eos_token_id
    if len(ids) and not 0 <= ids.min() <= ids.max() < entries:
        raise ValueError(f"data.sources.{source} holds the ids {ids.min()} to {ids.max()}, the tokenizer has {entries}")
    text_bytes = len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    return Encoded(ids if len(ids) and ids[0] == end else np.append(end, ids), None, text_bytes)


def _encode_words(example: Any, tokenizer: PreTrainedTokenizerBase, source: str) -> Encoded:
    words = tokenizer.convert_tokens_to_ids(example.words)
    wanted = tokenizer.convert_tokens_to_ids([word for word in example.targets if word is not None])
    unknown = tokenizer.unk_token_id
    if None in words + wanted or unknown in words + wanted:
        raise ValueError(
            f"data.sources.{source}: a word of the task is no token: use data.tokenizer=words, with a data.vocab_size "
            f"that has room for all of them ({UNKNOWN_WORD} and the end of text too)"
        )
    answers = iter(wanted)
    targets = np.array([IGNORED if word is None else next(answers) for word in example.targets])
    return Encoded(np.array(words), targets, len(" ".join(example.words).encode()))
