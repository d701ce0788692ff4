"""The selective scan in chunks of tokens, each chunk in strands that run side by side.

Every state decays at its own rate, so there is no product of matrices in this scan: only elementwise passes over
(b t d n), of which memory holds one chunk. How it is cut follows from what such passes cost. Doubling inside a chunk
(each token joined with the one 1, 2, 4, ... before it) passes over the chunk some fifty times, which no device has the
bandwidth for; a loop over the tokens passes once, in as many small kernels as there are tokens, which a GPU spends its
time launching. So the loop goes over the tokens of all strands of a chunk at once: first from a state of 0, which tells
what each strand does to the state it will find, then from that state. These are three passes, in an eighth of the
launches. (On a CPU they take two to three times as long as the loop over tokens; but there the C++ is meant to run.)

The backward computes a chunk again and keeps one state a chunk.

Letters: b batch, t tokens, d channels, n states of a channel; s strands.
"""

# ruff: noqa: N803, N806
# A, B and C are capitals in the field.

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_SIZE, STRAND_LENGTH = 64, 8


def selective_scan_chunked(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x, step (b t d), A (d n), B, C (b t n), state (b d n), starts (b t) -> y (b t d), state."""
    t = x.shape[1]
    if t <= CHUNK_SIZE:
        return _scan_chunk(x, step, B, C, starts, A, state)

    chunks = [z.split(CHUNK_SIZE, dim=1) for z in (x, step, B, C)]
    chunks.append([None] * len(chunks[0]) if starts is None else starts.split(CHUNK_SIZE, dim=1))
    keeps_graph = torch.is_grad_enabled() and any(z.requires_grad for z in (x, step, A, B, C, state))
    outputs = []
    for chunk in zip(*chunks, strict=True):
        if keeps_graph:
            y, state = checkpoint(_scan_chunk, *chunk, A, state, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_chunk(*chunk, A, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _scan_chunk(
    x: Tensor, step: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, A: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    t = x.shape[1]
    if t > 1 and t % STRAND_LENGTH:  # a step of 0 keeps the state
        x, step, B, C = (F.pad(z, (0, 0, 0, -t % STRAND_LENGTH)) for z in (x, step, B, C))
        starts = None if starts is None else F.pad(starts, (0, -t % STRAND_LENGTH))
    decay = (step[..., None] * A).exp()  # b t d n
    if starts is not None:
        decay = decay.masked_fill(starts[..., None, None], 0.0)
    write = (step * x)[..., None] * B[:, :, None]
    if t == 1:
        state = torch.addcmul(write.squeeze(1), decay.squeeze(1), state)
        return (state @ C.mT).mT, state
    h, state = _scan_strands(decay, write, state)
    return (h @ C[..., None]).squeeze(-1)[:, :t], state


def _scan_strands(decay: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = decay_t h_{t-1} + write_t, all (b t d n), t a multiple of a strand's length; state (b d n) -> h, state."""
    decays = decay.unflatten(1, (-1, STRAND_LENGTH)).unbind(2)  # one a token of a strand, of all strands: b s d n
    writes = write.unflatten(1, (-1, STRAND_LENGTH)).unbind(2)

    keep, add = decays[0], writes[0]  # what a strand does to the state it finds
    for a, w in zip(decays[1:], writes[1:], strict=True):
        keep, add = a * keep, torch.addcmul(w, a, add)
    found = []
    for a, w in zip(keep.unbind(1), add.unbind(1), strict=True):
        found.append(state)
        state = torch.addcmul(w, a, state)

    h = torch.stack(found, dim=1)
    states = []
    for a, w in zip(decays, writes, strict=True):
        h = torch.addcmul(w, a, h)
        states.append(h)
    return torch.stack(states, dim=2).flatten(1, 2), state
