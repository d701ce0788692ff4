"""Decays between the tokens of a chunk, which the PyTorch forms of the ops with a matrix state share.

Every exponent is a sum of the log-decays between a write and a read, never a difference of two sums: so none is
positive, none is lost to rounding, and a decay of 0 (a logarithm of minus infinity) is as good as any.

Letters: b batch, t time, h head, n chunk, c position in the chunk, s sub-chunk, d key. Log-decays inside chunks are
(b h n c d), or (b h n c 1) where all channels of a head share them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SUB_CHUNK_SIZE = 16


def into_chunks(x: Tensor, chunk: int) -> Tensor:
    """(b t h d) -> (b h n c d), padded with zeros: a padded position decays by exp(0) = 1 and writes nothing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).unflatten(2, (-1, chunk))


def from_chunks(x: Tensor, t: int) -> Tensor:
    """(b h n c d) -> (b t h d), without the padding."""
    return x.flatten(2, 3).transpose(1, 2)[:, :t]


def decayed_scores(
    reads: Sequence[Tensor], writes: Sequence[Tensor], log_decay: Tensor, reads_before_write: bool = False
) -> list[list[Tensor]]:
    """How much each read of a chunk finds of each write before it.

    Args:
        reads, writes: keys that read and keys that are written to, each (b h n c d).
        log_decay: (b h n c d|1); for one each channel, c is a multiple of SUB_CHUNK_SIZE.
        reads_before_write: a token reads what those before it wrote, not yet decayed by its own decay; otherwise it
            reads after it has decayed the state and written.

    Returns:
        For each of the reads and each of the writes (b h n c c), the read first; 0 where there is nothing yet to read.
    """
    if log_decay.shape[-1] == 1:
        decay = _decay_between(log_decay, reads_before_write).squeeze(-1)
        return [[read @ write.mT * decay for write in writes] for read in reads]
    return _scores_by_channel(reads, writes, log_decay, reads_before_write)


def since_start(log_decay: Tensor, reads_before_write: bool = False) -> Tensor:
    """(... c d) -> (... c d): the sum of log-decays from the beginning of the chunk to each read."""
    if reads_before_write:
        log_decay = F.pad(log_decay[..., :-1, :], (0, 0, 1, 0))
    return log_decay.cumsum(-2)


def until_end(log_decay: Tensor) -> Tensor:
    """(... c d) -> (... c d): the sum of log-decays behind each write up to the end of the chunk."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _scores_by_channel(
    reads: Sequence[Tensor], writes: Sequence[Tensor], log_decay: Tensor, reads_before_write: bool
) -> list[list[Tensor]]:
    """Scores where each key channel has its decay, which does not come out of the product of the keys.

    Inside a sub-chunk every pair has its own decays. A write before it is decayed up to where it begins, and a read in
    it from there on.
    """
    log_decay = log_decay.unflatten(-2, (-1, SUB_CHUNK_SIZE))  # b h n s c d
    reads, writes = ([x.unflatten(-2, (-1, SUB_CHUNK_SIZE)) for x in group] for group in (reads, writes))
    between = _decay_between(log_decay, reads_before_write)
    from_start, to_end = since_start(log_decay, reads_before_write).exp(), until_end(log_decay).exp()
    keeps = log_decay.sum(-2, keepdim=True).exp().unbind(3)
    scores = [[] for _ in reads]
    for write in writes:
        weighted = write[..., None, :, :] * between  # b h n s c c d
        earlier = _earlier_writes((to_end * write).unbind(3), keeps)
        for read, found in zip(reads, scores, strict=True):
            inside = (weighted @ read[..., None]).squeeze(-1)
            found.append(_assemble(inside.unbind(3), (from_start * read).unbind(3), earlier))
    return scores


def _earlier_writes(writes: Sequence[Tensor], keeps: Sequence[Tensor]) -> list[Tensor]:
    """For each sub-chunk the writes of all before it, decayed up to where it begins."""
    earlier = [writes[0][..., :0, :]]
    for write, keep in zip(writes[:-1], keeps[:-1], strict=True):
        earlier.append(torch.cat([keep * earlier[-1], write], dim=-2))
    return earlier


def _assemble(inside: Sequence[Tensor], reads: Sequence[Tensor], earlier: Sequence[Tensor]) -> Tensor:
    """The scores of a chunk from those inside sub-chunks and the reads of earlier ones."""
    rows = []
    for pairs, read, write in zip(inside, reads, earlier, strict=True):
        behind = (len(inside) - 1) * SUB_CHUNK_SIZE - write.shape[-2]
        rows.append(F.pad(torch.cat([read @ write.mT, pairs], dim=-1), (0, behind)))
    return torch.cat(rows, dim=-2)


def _decay_between(log_decay: Tensor, reads_before_write: bool) -> Tensor:
    """(... c d) -> (... c c d): the decay from a write (the second c) to a read (the first), 0 where it is not yet."""
    chunk = log_decay.shape[-2]
    ones = torch.ones(chunk, chunk, dtype=torch.bool, device=log_decay.device)
    later = ones.tril(-1)[..., None]
    between = torch.where(later, log_decay[..., :, None, :], 0).cumsum(-3)
    if reads_before_write:
        between, visible = F.pad(between[..., :-1, :, :], (0, 0, 0, 0, 1, 0)), later
    else:
        visible = ones.tril()[..., None]
    return between.masked_fill(~visible, -torch.inf).exp()
