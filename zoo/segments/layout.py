"""Which tokens of a call go into which run of the layers, where rows have segments and documents of their own.

Letters as in `zoo.segments`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import is_torchdynamo_compiling

from zoo.ops.packing import reorder
from zoo.segments.run import RowsFlag, Run


class Segmentation(NamedTuple):
    """How rows are cut into segments: a segment's tokens, and the rest as of `SegmentedStack`."""

    length: int
    aligns_right: bool
    freezes: bool
    documents_share_runs: bool
    counts_ahead: bool
    """Whether there are as many runs as rows of this length can need, whatever is in them."""

    def borders(self, t: int, start: int, is_first: bool) -> list[int]:
        """Behind how many of t tokens segments are full, where the open one has `start` before them."""
        if self.freezes and not is_first:
            return []
        missing = -t % self.length if self.aligns_right and is_first else 0
        borders = list(range(self.length - missing - start, t + 1, self.length))
        return borders[:-1] if self.freezes and borders[-1:] == [t] else borders

    def lay_out(self, position: Tensor, x: Tensor, mask: Tensor | None, starts: Tensor | None) -> "Layout":
        """Cut the rows of x (b t d), whose padding stands behind, into runs.

        A run ends where a segment is full, and after 2 length - 1 tokens where short documents share it. Such a run and
        the next together have 2 length tokens or more, so there are never more runs than if all segments were full.

        Args:
            position: (b), tokens that the open segment has before the first; -1: none, and this is the first call.
            mask: (b t), False at padding.
            starts: (b t), True where a document starts; None: nowhere.
        """
        (b, t), length, device = x.shape[:2], self.length, x.device
        rank = torch.arange(t, device=device).expand(b, t)
        real = torch.ones_like(rank, dtype=torch.bool) if mask is None else mask
        total, is_first = real.sum(dim=1, keepdim=True), (position < 0)[:, None]

        places = position.clamp(min=0)[:, None] + rank  # in the document, or since the open segment began
        if starts is not None:
            begin = torch.where(starts, rank, -1).cummax(dim=1).values
            places = torch.where(begin < 0, places, rank - begin)
        index = places + (-total % length).masked_fill(~is_first, 0) if self.aligns_right else places
        fills = real & (index % length == length - 1)
        in_segment = torch.where(index < length, places, index % length)
        if self.freezes:
            fills = fills & is_first & (rank < total - 1)
            in_segment = torch.where(is_first, in_segment, places)

        cuts = F.pad(fills[:, :-1], (1, 0), value=True)
        if starts is not None and not self.documents_share_runs:
            cuts = cuts | starts
        width = min(2 * length - 1, t)
        within = (rank - torch.where(cuts, rank, 0).cummax(dim=1).values) % width
        run = (within == 0).cumsum(dim=1) - 1
        if self.counts_ahead:  # compiled packed rows are never cached: they have read nothing before
            known = not is_torchdynamo_compiling()
            before = int(position.max().clamp(min=0)) if known else (length - 1 if starts is None else 0)
            count = min(t, (before + t + length - 1) // length)
        else:
            count = int(run.masked_fill(~real, 0).max()) + 1
        run = run.masked_fill(~real, count)

        def per_run(values: Tensor) -> Tensor:
            """The sum over the tokens (b t) of each run, (b r)."""
            return values.new_zeros(b, count + 1, dtype=torch.long).scatter_add(1, run, values.long())[:, :count]

        lengths = per_run(real)
        first = lengths.cumsum(dim=1) - lengths
        tokens = (first[..., None] + torch.arange(width, device=device)).clamp(max=t - 1)
        first, is_used = tokens[:, :, 0], lengths > 0
        begins = restarts = documents = None
        if starts is not None:
            begins = is_used & starts.gather(1, first)
            restarts = per_run(starts & real) > begins
            documents = starts.cumsum(dim=1)
        widths = [width] * count if is_torchdynamo_compiling() else lengths.amax(dim=0).clamp(min=1).tolist()
        offsets = torch.tensor([0, *widths], device=device).cumsum(dim=0)
        last = (total - 1).clamp(min=0)
        after = (in_segment.gather(1, last) + 1).masked_fill(fills.gather(1, last), 0)
        return Layout(
            slots=(offsets[run.clamp(max=count - 1)] + within).masked_fill(~real, 0),
            tokens=tokens,
            lengths=lengths,
            places=in_segment,
            opens=is_used & (in_segment.gather(1, first) == 0),
            closes=per_run(fills) > 0,
            begins=begins,
            restarts=restarts,
            documents=documents,
            widths=widths,
            position=torch.where(total > 0, after, position[:, None]).squeeze(1),
        )


class Layout(NamedTuple):
    """Where the tokens of a call go: r runs, one after the other, each of some slots for every row.

    slots: (b t), of each token; 0 for padding.
    tokens: (b r n), which token a slot holds, where it holds one.
    lengths: (b r), how many it holds.
    places: (b t), of each token in its segment.
    opens, closes: (b r), as in `Run`.
    begins, restarts: (b r), whether a document starts with the run, or inside of it; None: nowhere.
    documents: (b t), ids; None: one a row.
    widths: of each run.
    position: (b), how many tokens the open segment has at the end.
    """

    slots: Tensor
    tokens: Tensor
    lengths: Tensor
    places: Tensor
    opens: Tensor
    closes: Tensor
    begins: Tensor | None
    restarts: Tensor | None
    documents: Tensor | None
    widths: list[int]
    position: Tensor

    def runs(self, x: Tensor, options: dict[str, Any]) -> Iterator[tuple[Tensor, Run, RowsFlag | None]]:
        """Each run: its embeddings (b n d) of x (b t d), what it holds, and in which rows a document starts with it."""
        for r, width in enumerate(self.widths):
            tokens, lengths = self.tokens[:, r, :width], self.lengths[:, r]
            restarts = None if self.restarts is None else _settle(self.restarts[:, r])
            several = self.documents is not None and restarts is not False
            run = Run(
                self.places.gather(1, tokens),
                opens=_settle(self.opens[:, r]),
                closes=_settle(self.closes[:, r]),
                lengths=None if _settle(lengths == width) is True else lengths,
                segments=self.documents.gather(1, tokens) if several else None,
                restarts=self.restarts[:, r] if several else None,
                options=options,
            )
            yield reorder(x, tokens), run, None if self.begins is None else _settle(self.begins[:, r])


def _settle(rows: Tensor) -> RowsFlag:
    """(b) bool -> the one truth of all rows if they agree; a graph cannot look."""
    if is_torchdynamo_compiling() or (rows.any() and not rows.all()):
        return rows
    return bool(rows[0])
