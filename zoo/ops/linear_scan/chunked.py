"""The linear scan in chunks: doubling inside all chunks at once, then one step a chunk.

Two steps of h -> a h + b are one step of the same kind, (a2 a1, a2 b1 + b2); after log2(c) rounds of joining each
position with the one 1, 2, 4, ... before it, every position holds all of its chunk up to itself. Nothing is divided and
no logarithm is taken, so any a, 0 included, is as good as another.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_SIZE = 32


def linear_scan_chunked(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """a, b (b t d), state (b d) -> h (b t d), state."""
    t = a.shape[1]
    if t == 1:
        state = a.squeeze(1) * state + b.squeeze(1)
        return state[:, None], state

    chunk = min(CHUNK_SIZE, t)
    a = F.pad(a, (0, 0, 0, -t % chunk), value=1.0).unflatten(1, (-1, chunk))  # b n c d
    b = F.pad(b, (0, 0, 0, -t % chunk)).unflatten(1, (-1, chunk))
    reach = 1
    while reach < chunk:
        b = torch.cat([b[:, :, :reach], b[:, :, reach:] + a[:, :, reach:] * b[:, :, :-reach]], dim=2)
        a = torch.cat([a[:, :, :reach], a[:, :, reach:] * a[:, :, :-reach]], dim=2)
        reach *= 2

    before = []
    for keep, add in zip(a[:, :, -1].unbind(1), b[:, :, -1].unbind(1), strict=True):
        before.append(state)
        state = keep * state + add
    h = a * torch.stack(before, dim=1)[:, :, None] + b
    return h.flatten(1, 2)[:, :t], state
