"""Tokenised documents on disk, memory-mapped, kept from run to run.

A store is a folder of shards. A shard appears whole (`zoo.files.whole_folder`) and never changes; it holds the tokens
of many documents one behind the other, where each begins, and where to go on reading the source behind them:

    <cache>/<source>-<hash of source and tokenizer>/00000000/{tokens,starts[,targets]}.npy, shard.json

Any process may read while one appends. Whoever holds the store's lock appends, and the lock goes with its process.
"""

import json
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from zoo.files import whole_folder

_SMALLEST_SHARD, _LARGEST_SHARD = 2**18, 2**25  # tokens; between them a shard is as large as all before it

IGNORED = -100
"""The target of a token that predicts nothing."""


class Encoded(NamedTuple):
    """A document as token ids, (n)."""

    ids: np.ndarray
    targets: np.ndarray | None
    """(n), what each token shall predict, -100 for nothing; None: the token behind it."""
    text_bytes: int


class EncodedPiece(NamedTuple):
    """Documents that stand behind each other, and where the source goes on behind them."""

    documents: list[Encoded]
    resume: Any


class TokenStore:
    """The tokens of one source, as far as they are on disk.

    Args:
        folder: where they are, or will be.
        dtype: of the ids on disk.
        row_length: no document is cut between two rows of this many tokens, and gaps are filled with what predicts
            nothing; None: documents follow each other closely.
        filler: the id that gaps are filled with.
    """

    def __init__(self, folder: Path, dtype: np.dtype, row_length: int | None = None, filler: int = 0):
        self.folder, self.dtype, self.row_length, self.filler = folder, dtype, row_length, filler
        self.is_complete = False
        self.documents = self.text_bytes = 0
        self._ends: list[int] = []  # tokens up to the end of each shard
        self._resume: Any = None
        self._open = lru_cache(maxsize=64)(self._open_shard)  # of hundreds; each takes file descriptors
        self.refresh()

    @property
    def tokens(self) -> int:
        """How many tokens there are so far."""
        return self._ends[-1] if self._ends else 0

    @property
    def has_targets(self) -> bool:
        """Whether documents say what is predicted, and it is not the tokens behind; asked of a store with tokens."""
        return "targets" in self._open(0)

    def refresh(self) -> None:
        """Take in the shards that appeared since."""
        while not self.is_complete:
            shard = self._path(len(self._ends))
            if not shard.is_dir():
                return
            facts = json.loads((shard / "shard.json").read_text())
            self._ends.append(self.tokens + facts["tokens"])
            self.documents += facts["documents"]
            self.text_bytes += facts["text_bytes"]
            self._resume, self.is_complete = facts["resume"], facts["is_last"]

    def append(self, read: Callable[[Any], Iterator[EncodedPiece]]) -> Iterator[None]:
        """Read the source to its end, from where the last shard stopped; yields after each shard.

        The caller holds the store's lock.

        Raises:
            ValueError: if a document of a store with rows is longer than a row.
        """
        self.refresh()
        if self.is_complete:
            return
        waiting: list[Encoded] = []
        size, resume = 0, self._resume
        for piece in read(resume):
            waiting += piece.documents
            size += sum(len(document.ids) for document in piece.documents)
            resume = piece.resume
            if size >= self._next_size():
                self._publish(waiting, resume, is_last=False)
                waiting, size = [], 0
                yield
        self._publish(waiting, resume, is_last=True)
        yield

    def lock(self) -> FileLock:
        """The lock that whoever appends must hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:08d}"

    def _open_shard(self, shard: int) -> dict[str, np.ndarray]:
        return {path.stem: np.load(path, mmap_mode="r") for path in self._path(shard).glob("*.npy")}

    def _next_size(self) -> int:
        return max(_SMALLEST_SHARD, min(_LARGEST_SHARD, self.tokens))

    def _publish(self, documents: list[Encoded], resume: Any, is_last: bool) -> None:
        has_targets = any(document.targets is not None for document in documents)
        ids, targets, starts, offset = [], [], [], self.tokens
        for document in self._fill_gaps(documents):
            starts.append(offset - self.tokens)
            offset += len(document.ids)
            ids.append(document.ids)
            targets.append(document.targets)
        arrays = {
            "tokens": np.concatenate([np.zeros(0, self.dtype), *ids]).astype(self.dtype),
            "starts": np.array(starts, dtype=np.int64),
        }
        if has_targets:
            arrays["targets"] = np.concatenate(targets).astype(np.int32)
        facts = {
            "tokens": len(arrays["tokens"]),
            "documents": len(documents),
            "text_bytes": sum(document.text_bytes for document in documents),
            "resume": resume,
            "is_last": is_last,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(self._path(len(self._ends))) as partial:
            for name, array in arrays.items():
                np.save(partial / f"{name}.npy", array)
            (partial / "shard.json").write_text(json.dumps(facts))
        self.refresh()

    def _fill_gaps(self, documents: list[Encoded]) -> Iterator[Encoded]:
        if self.row_length is None:
            yield from documents
            return
        offset = self.tokens
        for document in documents:
            length, room = len(document.ids), self.row_length - offset % self.row_length
            if length > self.row_length:
                raise ValueError(f"an example has {length} tokens, a row {self.row_length}: see data.sequence_length")
            if length > room:
                yield Encoded(np.full(room, self.filler), np.full(room, IGNORED), 0)
                offset += room
            yield document
            offset += length

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens `start` to `stop` of all, which must be there.

        Returns:
            ids (n) int64; targets (n) int64, what each shall predict, -100 for nothing; whether each starts a document
            (n) bool.
        """
        ids = self._cut("tokens", start, stop)
        begins = np.zeros(stop - start, dtype=bool)
        for shard, shift in self._overlapping(start, stop):
            starts = shard["starts"]
            low, high = np.searchsorted(starts, (start - shift, stop - shift))
            begins[starts[low:high] + shift - start] = True
        if self.has_targets:
            return ids, self._cut("targets", start, stop), begins
        targets = self._cut("tokens", start + 1, min(stop + 1, self.tokens))
        return ids, np.append(targets, np.full(len(ids) - len(targets), IGNORED)), begins

    def document_start(self, token: int) -> int:
        """Where the document begins that a token is of."""
        for index in range(bisect_right(self._ends, token), -1, -1):
            shift, starts = self._shift(index), self._open(index)["starts"]
            before = np.searchsorted(starts, token - shift, side="right")
            if before:
                return int(starts[before - 1]) + shift
        return 0

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """The shards with tokens from `start` to `stop`, each with how many tokens stand in front of it."""
        for index in range(bisect_right(self._ends, start), len(self._ends)):
            if (shift := self._shift(index)) >= stop:
                return
            yield self._open(index), shift

    def _shift(self, shard: int) -> int:
        """How many tokens stand in front of a shard."""
        return self._ends[shard - 1] if shard else 0

    def _cut(self, name: str, start: int, stop: int) -> np.ndarray:
        parts = [shard[name][max(0, start - shift) : stop - shift] for shard, shift in self._overlapping(start, stop)]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


class BackgroundFiller:
    """Appends to a store from a thread, some way ahead of what is read, unless another process does.

    Args:
        store: what is filled. The thread has its own view of it.
        read: as for `TokenStore.append`.
        ahead: tokens to be ahead of what was asked for.
    """

    def __init__(self, store: TokenStore, read: Callable[[Any], Iterator[EncodedPiece]], ahead: int):
        self.store, self._read, self._ahead = store, read, ahead
        self._wanted, self._error, self._stop = 0, None, threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tokenise {store.folder.name}", daemon=True)
        self._thread.start()

    def wait_for(self, tokens: int) -> None:
        """Return once the store has this many tokens, or is complete.

        Raises:
            ValueError: what reading or tokenising the source ended in.
        """
        self._wanted = max(self._wanted, tokens)
        self.store.refresh()
        while self.store.tokens < tokens and not self.store.is_complete:
            if self._error is not None:
                raise self._error
            time.sleep(0.02)
            self.store.refresh()

    def close(self) -> None:
        """Stop the thread; what it has not published is read again another time."""
        self._stop.set()
        self._thread.join(timeout=5)  # it may be waiting for the network, and ends with the process

    def _run(self) -> None:
        view = TokenStore(self.store.folder, self.store.dtype, self.store.row_length, self.store.filler)
        lock = view.lock()
        while not self._stop.is_set() and not view.is_complete:
            try:
                lock.acquire(timeout=0.5)
            except Timeout:  # another process appends
                view.refresh()
                continue
            try:
                for _ in view.append(self._read_until_stopped):
                    while view.tokens > self._wanted + self._ahead and not self._stop.is_set():
                        self._stop.wait(0.05)
            except _Stopped:
                return
            except Exception as error:  # for the thread that waits
                self._error = error
                return
            finally:
                lock.release()

    def _read_until_stopped(self, resume: Any) -> Iterator[EncodedPiece]:
        for piece in self._read(resume):
            if self._stop.is_set():
                raise _Stopped
            yield piece


class _Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """The filler was closed while it read."""
