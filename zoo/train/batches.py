"""Rows of tokens in an order that follows from the seed, and batches that are a function of seed, step and rank.

A row is `sequence_length` tokens of one source; each token of a source is in one row of a pass, and is the target of
one token. Rows of several sources alternate by their weights, as evenly as whole rows can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from zoo.train.store import IGNORED, BackgroundFiller, TokenStore

WINDOW = 4096
"""Rows of a streamed source that are shuffled among each other: it is not known how many will follow."""


@dataclass(frozen=True)
class Stream:
    """A store to read rows from, and how many of them in proportion to other streams."""

    store: TokenStore
    weight: float = 1.0
    is_streamed: bool = False
    """Whether rows are shuffled in windows, since nobody waited for all of them; also once they are there."""
    filler: BackgroundFiller | None = None
    """What appends to the store while it is read; None: it is complete."""


class Batches:
    """The batches of a run.

    Args:
        streams: what rows are taken from.
        sequence_length: tokens t of a row.
        batch_size: rows of a step, of all processes.
        seed: of the order.
        isolate: whether batches have the positions that tell documents apart.
        carry: rows of one step go on where those of the step before ended. Each of the `batch_size` rows walks through
            the source, which has no end but starts again, and over as many steps as it has rows each row is read by
            all of them once.
        filler: id that fills the last row of a source.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        sequence_length: int,
        batch_size: int,
        seed: int,
        isolate: bool = True,
        carry: bool = False,
        filler: int = 0,
    ):
        self.streams, self.sequence_length, self.batch_size = list(streams), sequence_length, batch_size
        self.seed, self.isolate, self.carry, self.filler = seed, isolate, carry, filler
        self._turns = _Turns([stream.weight for stream in streams])
        self._permutation = lru_cache(maxsize=2 * len(self.streams))(self._permutation_of)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """The rows that a process reads in a step, counted from 0.

        Returns:
            `input_ids` and `shift_labels` (b t), and `position_ids` (b t) where documents are isolated or the state is
            carried; b is the batch size over the number of processes.
        """
        share, left = divmod(self.batch_size, world_size)
        assert not left, f"{self.batch_size} rows do not divide among {world_size} processes"
        first = step * self.batch_size + rank * share
        rows = [self._row(first + i, step) for i in range(share)]
        ids, targets, positions = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        batch = {"input_ids": ids, "shift_labels": targets}
        if self.isolate or self.carry:
            batch["position_ids"] = positions
        return batch

    def _row(self, number: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `number` of the run: ids, targets and positions, each (t)."""
        if self.carry:
            store = self.streams[0].store
            rows = self._rows(store)
            lane = number - step * self.batch_size
            return self._read(store, (lane * rows // self.batch_size + step) % rows)
        source, turn = self._turns[number]
        return self._read(self.streams[source].store, self._place(source, turn))

    def _rows(self, store: TokenStore) -> int:
        return count_rows(store, self.sequence_length)

    def _place(self, source: int, turn: int) -> int:
        """Which row of a source its turn-th row of the run is."""
        stream = self.streams[source]
        if not stream.is_streamed:
            passed, place = divmod(turn, self._rows(stream.store))
            return int(self._permutation(source, passed, self._rows(stream.store))[place])
        window, place = divmod(turn, WINDOW)
        if stream.filler is not None:
            stream.filler.wait_for((window + 1) * WINDOW * self.sequence_length + 1)
        if stream.store.is_complete:  # it has an end, so turns behind it are those of another pass
            rows = self._rows(stream.store)
            passed, turn = divmod(turn, rows)
            window, place = divmod(turn, WINDOW)
            size = min(WINDOW, rows - window * WINDOW)
        else:
            passed, size = 0, WINDOW
        return window * WINDOW + int(self._permutation(source, (passed, window), size)[place])

    def _permutation_of(self, source: int, part: int | tuple[int, int], size: int) -> np.ndarray:
        key = part if isinstance(part, tuple) else (part,)
        return np.random.default_rng([self.seed, source, *key]).permutation(size)

    def _read(self, store: TokenStore, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, targets, begins = read_row(store, row, self.sequence_length, self.filler)
        positions = positions_in_documents(begins)
        if self.carry and not begins[0]:  # the document that goes on here has come further already
            start = row * self.sequence_length
            positions[: begins.argmax() if begins.any() else None] += start - store.document_start(start)
        return ids, targets, positions


def positions_in_documents(begins: np.ndarray) -> np.ndarray:
    """From where documents begin in a row, (t) bool, how far from there each token is, (t)."""
    place = np.arange(len(begins))
    return place - np.maximum.accumulate(np.where(begins, place, 0))


def count_rows(store: TokenStore, length: int) -> int:
    """How many rows of a length a store's tokens fill, the last perhaps in part."""
    return -(-store.tokens // length)


def read_row(store: TokenStore, row: int, length: int, filler: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row `row` of a store's tokens: ids, targets and whether a document begins, each (length).

    The last row is filled up with what stands behind the text as a document of its own and predicts nothing.
    """
    ids, targets, begins = store.read(row * length, min((row + 1) * length, store.tokens))
    if gap := length - len(ids):
        ids = np.append(ids, np.full(gap, filler))
        targets = np.append(targets, np.full(gap, IGNORED))
        begins = np.append(begins, np.arange(gap) == 0)
    return ids, targets, begins


class _Turns:
    """Which stream each row of a run is of: the k-th row of a stream comes at time (k + 1/2) / weight."""

    def __init__(self, weights: Sequence[float]):
        self._share = np.array(weights) / sum(weights)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The stream of a row, and how many rows of it come before."""
        if len(self._share) == 1:
            return 0, number
        block, place = divmod(number, _TURNS_A_BLOCK)
        sources, turns = self._block(block)
        return int(sources[place]), int(turns[place])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """All rows from `block` blocks on, of one block: merged by time from a little before to a little after."""
        first, last = block * _TURNS_A_BLOCK, (block + 1) * _TURNS_A_BLOCK
        slack = len(self._share) + 1  # rows up to a time differ from it by half a row a stream at most
        sources, turns, before = [], [], 0
        for source, share in enumerate(self._share):
            low = max(0, int((first - slack) * share))
            high = int((last + slack) * share) + 2
            before += low
            sources.append(np.full(high - low, source))
            turns.append(np.arange(low, high))
        sources, turns = np.concatenate(sources), np.concatenate(turns)
        times = (turns + 0.5) / self._share[sources]
        order = np.lexsort((sources, times))[first - before :][:_TURNS_A_BLOCK]
        return sources[order], turns[order]


_TURNS_A_BLOCK = 4096
