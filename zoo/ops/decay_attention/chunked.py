"""Decayed linear attention in chunks: products inside a chunk, one state update a chunk (arXiv:2307.08621, eq. 7).

Letters: b batch, h head, n chunk, c position in the chunk, d key, e value.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.decay import SUB_CHUNK_SIZE, decayed_scores, from_chunks, into_chunks, since_start, until_end

CHUNK_SIZE = 64


def decay_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    normalizer: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments are those of the op."""
    t = q.shape[1]
    if t == 1:
        return _step(q, k, v, log_decay, state, bonus, normalizer, starts)

    chunk = min(CHUNK_SIZE, t + -t % SUB_CHUNK_SIZE)
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    q, k, v, log_decay = (into_chunks(x, chunk) for x in (q, k, v, log_decay))
    reads_before_write = bonus is not None
    ((scores,),) = decayed_scores((q,), (k,), log_decay, reads_before_write)  # b h n c c
    reads = since_start(log_decay, reads_before_write).exp() * q
    writes = until_end(log_decay).exp() * k
    keeps = log_decay.sum(-2).exp()  # b h n d|1
    if starts is not None:
        ids = F.pad(starts, (0, -t % chunk)).cumsum(1).unflatten(1, (-1, chunk))[:, None]  # b 1 n c
        last = ids[..., -1]
        carried = F.pad(last[..., :-1], (1, 0))  # the document that S belongs to: b 1 n
        scores = scores * (ids[..., :, None] == ids[..., None, :])
        reads = reads * (ids == carried[..., None])[..., None]
        writes = writes * (ids == last[..., None])[..., None]
        keeps = keeps * (last == carried)[..., None]

    y = scores @ v
    if bonus is not None:
        y = y + (q * bonus[:, None, None] * k).sum(-1, keepdim=True) * v
    before, state = _carry(keeps[..., None], writes.mT @ v, state)
    y = from_chunks(y + reads @ before, t)
    if normalizer is None:
        return y, state, v.new_empty(0), state.new_empty(0)
    before, normalizer = _carry(keeps, writes.sum(-2), normalizer)
    q_n = scores.sum(-1, keepdim=True) + reads @ before[..., None]
    return y, state, from_chunks(q_n, t).squeeze(-1), normalizer


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    normalizer: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token, without the chunks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b h 1 d|e
    decay = log_decay.exp().squeeze(1)
    decay = decay if log_decay.dim() == 4 else decay[..., None]  # b h d|1
    if starts is not None:
        state = state.masked_fill(starts[..., None, None], 0.0)
    write = k.mT * v
    read = state if bonus is None else state + bonus[..., None] * write
    state = decay[..., None] * state + write
    y = (q @ (state if bonus is None else read)).transpose(1, 2)
    if normalizer is None:
        return y, state, v.new_empty(0), state.new_empty(0)
    if starts is not None:
        normalizer = normalizer.masked_fill(starts[..., None], 0.0)
    normalizer = decay * normalizer + k.squeeze(2)
    return y, state, (q.squeeze(2) * normalizer).sum(-1)[:, None], normalizer


def _carry(keeps: Tensor, writes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, (b h n ...), and the one after the last."""
    before = []
    for keep, write in zip(keeps.unbind(2), writes.unbind(2), strict=True):
        before.append(state)
        state = keep * state + write
    return torch.stack(before, dim=2), state
