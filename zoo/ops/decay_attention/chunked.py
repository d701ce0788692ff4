"""Decayed linear attention in chunks: products inside a chunk, one state update a chunk (arXiv:2307.08621, eq. 7).

Letters: b batch, h head, n chunk, c position in the chunk, d key, e value. Every exponent is a sum of the log-decays
between a write and a read, never a difference of two sums: so none is positive, none is lost to rounding, and a decay
of 0 (a logarithm of minus infinity) is as good as any.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_SIZE = 64


def decay_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k (b t h d), v (b t h e), log_decay (b|1 t h), state (b h d e), segments (b t) -> y (b t h e), state."""
    t = q.shape[1]
    if t == 1:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b h 1 d|e
        state = log_decay.exp().squeeze(1)[..., None, None] * state + k.mT * v
        return (q @ state).transpose(1, 2), state

    chunk = min(CHUNK_SIZE, t)
    q, k, v = (_into_chunks(x, chunk) for x in (q, k, v))  # b h n c d|e
    log_decay = _into_chunks(log_decay[..., None], chunk).squeeze(-1)  # b|1 h n c
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril(-1)
    between = torch.where(later, log_decay[..., :, None], 0).cumsum(-2)  # from write (last) to read: b|1 h n c c
    visible = later | torch.eye(chunk, dtype=torch.bool, device=q.device)
    since_start = log_decay.cumsum(-1)
    reads_carry, writes_carry, keeps_carry = since_start.exp(), between[..., -1, :].exp(), since_start[..., -1].exp()
    if segments is not None:
        ids = torch.cat([segments, segments[:, -1:].expand(-1, -t % chunk)], dim=1)
        ids = ids.unflatten(1, (-1, chunk))[:, None]  # b 1 n c
        last = ids[..., -1]
        carried = torch.cat([ids[..., :1, 0], last[..., :-1]], dim=-1)  # the document that S belongs to: b 1 n
        visible = visible & (ids[..., :, None] == ids[..., None, :])
        reads_carry = reads_carry * (ids == carried[..., None])
        writes_carry = writes_carry * (ids == last[..., None])
        keeps_carry = keeps_carry * (last == carried)

    decay = between.masked_fill(~visible, -torch.inf).exp()
    y = (q @ k.mT * decay) @ v
    writes = (k * writes_carry[..., None]).mT @ v  # b h n d e

    before = []
    for write, keep in zip(writes.unbind(2), keeps_carry.unbind(2), strict=True):
        before.append(state)
        state = keep[..., None, None] * state + write
    y = y + (q * reads_carry[..., None]) @ torch.stack(before, dim=2)
    return y.flatten(2, 3).transpose(1, 2)[:, :t], state


def _into_chunks(x: Tensor, chunk: int) -> Tensor:
    """(b t h d) -> (b h n c d), padded with zeros: a padded position decays by exp(0) = 1 and writes nothing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).unflatten(2, (-1, chunk))
