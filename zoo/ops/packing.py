"""Padding and packed documents, the same for every op.

A masked token neither writes to a state nor lets it decay, and its output is 0. A packed document starts with the state
of a new sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def segment_starts(segments: Tensor | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """(b t) ids of documents -> (b t) bool, True at the first token of each but the row's first, which goes on.

    Only real tokens start a document: with a mask (b t), False at padding, whatever ids stand at padding mean nothing.

    Args:
        segments, mask: as they are given to an op.
        x: a sequence of the op, (b t ...).

    Raises:
        ValueError: if `segments` are no integers (b t).
    """
    if segments is None:
        return None
    if segments.is_floating_point():
        raise ValueError(f"segments are {segments.dtype}, wanted integers")
    _check_packing("segments", segments, x)
    if mask is None:
        return torch.diff(segments, dim=1, prepend=segments[:, :1]) != 0
    place = torch.arange(mask.shape[1], device=mask.device)
    latest = torch.where(mask, place, -1).cummax(dim=1).values  # the last real token up to each
    previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    return mask & (previous >= 0) & (segments != segments.gather(1, previous.clamp(min=0)))


def fill_padding(mask: Tensor | None, value: float, *sequences: Tensor) -> tuple[Tensor, ...]:
    """Put `value` where `mask` (b t) is False in each of the sequences (b t ...): nothing of them is read there.

    Raises:
        ValueError: if the mask is not of bool, or not (b t).
    """
    if mask is None:
        return sequences
    for x in sequences:
        check_mask(mask, x)
    return tuple(x.masked_fill(_expand(~mask, x), value) for x in sequences)


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Raise ValueError if a mask is not of bool, or not (b t) for a sequence (b t ...)."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, wanted torch.bool: True at tokens, False at padding")
    _check_packing("mask", mask, x)


def _check_packing(name: str, given: Tensor, x: Tensor) -> None:
    if given.shape != x.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, wanted (b t) = {tuple(x.shape[:2])}")
    if given.device != x.device:
        raise ValueError(f"{name} is on device {given.device}, its sequences are on {x.device}")


def move_padding_behind(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The order that puts the real tokens of each row first, in their order: for an op that looks back by places.

    Args:
        mask: (b t), False at padding.

    Returns:
        Which column then stands at each place, (b t), and how many real tokens each row has, (b).
    """
    return (~mask).int().sort(dim=1, stable=True).indices, mask.sum(dim=1)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """(b t ...) -> the tokens that stand at places (b s) of their rows, (b s ...)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (rows + order).flatten()).unflatten(0, order.shape)


def restore_order(x: Tensor, order: Tensor) -> Tensor:
    """(b t ...) in an order (b t) -> the order before: what undoes `reorder`."""
    return torch.empty_like(x).scatter(1, _expand(order, x), x)


def _expand(order: Tensor, x: Tensor) -> Tensor:
    return order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])


class ChunkLayout(NamedTuple):
    """Slots for the tokens of a batch, such that the chunks of all rows begin at the same slots (`lay_out_chunks`).

    Letters: b batch, t tokens, s slots, n runs of slots.

    slots: (b t), where each token goes; padding goes behind the last slot.
    tokens: (b s), which token a slot holds, where it holds one.
    real: (b s), whether it does.
    opens: (b n), whether a chunk opens with the run; if not, the run goes on with the chunk before or is empty.
    restarts: (b n), whether a document starts with the run; None where no row has a second one.
    position: (b), int64, how many tokens the chunk has that is open at the end; 0 where it is full.
    """

    slots: Tensor
    tokens: Tensor
    real: Tensor
    opens: Tensor
    restarts: Tensor | None
    position: Tensor

    def into_slots(self, *sequences: Tensor) -> tuple[Tensor, ...]:
        """Each of the sequences (b t ...) -> (b s ...), 0 in empty slots; padding is not read."""
        return fill_padding(self.real, 0.0, *(reorder(x, self.tokens) for x in sequences))

    def out_of_slots(self, x: Tensor) -> Tensor:
        """(b s ...) -> (b t ...), 0 at padding."""
        return reorder(torch.cat([x, torch.zeros_like(x[:, :1])], dim=1), self.slots)


def lay_out_chunks(
    mask: Tensor, starts: Tensor | None, position: Tensor | None, chunk_size: int, width: int
) -> ChunkLayout:
    """Cut every row into chunks where they fall, and give all rows' chunks the same slots, in runs of `width`.

    A chunk has `chunk_size` tokens, padding not counted; the last of a document may have fewer. A row goes on with the
    chunk that its last call left open, a document begins a new one. What a call has of a chunk takes a run of slots, or
    several where it is longer than one.

    Args:
        mask: (b t), False at padding.
        starts: (b t), True at real tokens with which a document starts (`segment_starts`); None: nowhere. With it the
            number of slots depends on the data; in a compiled graph there are enough for documents that have a run each
            on average, and more of them end in a RuntimeError.
        position: (b), int64, how many tokens the chunk has that is open before the first token; None: none.
        chunk_size: tokens of a chunk.
        width: slots of a run, at most `chunk_size`.
    """
    b, t = mask.shape
    rank = mask.cumsum(1) - 1  # of a token in its row
    carried = 0 if position is None else position[:, None]  # tokens of its first chunk in calls before
    index = rank + carried
    if starts is not None:
        index = torch.where(starts, rank, -1).cummax(1).values
        index = torch.where(index < 0, rank + carried, rank - index)  # in its document
        carried = carried * (starts.cumsum(1) == 0)
    in_chunk = index % chunk_size
    in_run = (in_chunk - carried * (index < chunk_size)) % width
    opens_run = mask & (in_run == 0)
    run = opens_run.cumsum(1) - 1
    slots = run * width + in_run
    if starts is None:
        runs = t // chunk_size * -(-chunk_size // width) + -(-(t % chunk_size) // width)
        runs = runs if position is None else min(t, runs + 1)  # an open chunk may leave one more open at the end
    elif torch.compiler.is_compiling():  # sizes of a graph cannot depend on the data
        runs = min(t, 2 * -(-t // width) + 1)
        message = f"a compiled graph takes packed documents of {width} tokens on average, these are shorter"
        torch._assert_async((run < runs).all(), message)
    else:
        runs = max(1, int(run.max()) + 1)

    def spread(values: Tensor, where: Tensor, places: Tensor, size: int) -> Tensor:
        """Values (b t) to their places (b t) among (b size), 0 elsewhere."""
        places = places.masked_fill(~where, size)
        return torch.zeros(b, size + 1, dtype=values.dtype, device=values.device).scatter(1, places, values)[:, :size]

    at_end = torch.where(mask & (rank == rank[:, -1:]), in_chunk + 1, 0).sum(1) % chunk_size
    return ChunkLayout(
        slots=slots.masked_fill(~mask, runs * width),
        tokens=spread(torch.arange(t, device=mask.device).expand(b, t), mask, slots, runs * width),
        real=spread(mask, mask, slots, runs * width),
        opens=spread(in_chunk == 0, opens_run, run, runs),
        restarts=None if starts is None else spread(starts, opens_run, run, runs),
        position=at_end if position is None else torch.where(mask.any(1), at_end, position),
    )
