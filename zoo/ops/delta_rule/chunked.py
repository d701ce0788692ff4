"""The delta rule in chunks: what each token takes back depends on those before it, a triangular system for each chunk.

In the general form the reads r_t = S_{t-1}^T a_t solve (I - A_ab) R = A_ak V + (a decayed from the start) S, with A_xy
how much x finds of y. In the gated form the writes u_t = beta_t (v_t - what is there) solve
(I + beta A_kk) U = beta V - beta (k decayed from the start) S: the WY form of arXiv:2406.06484 and arXiv:2412.06464.
Both solutions are affine in S, the state before the chunk: the systems of all chunks are solved at once, and only
S -> transition S + write is left to do one chunk after the other.

Letters: b batch, h head, n chunk, c position in the chunk, d key, e value.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.decay import SUB_CHUNK_SIZE, decayed_scores, from_chunks, into_chunks, since_start, until_end

CHUNK_SIZE = 64


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The arguments are those of the op."""
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    if starts is not None:  # with a decay of 0 and nothing taken back, nothing of the old state is left
        starts = starts[..., None, None]
        log_decay = log_decay.masked_fill(starts, -torch.inf)
        a = None if a is None else a.masked_fill(starts, 0.0)
    beta = None if beta is None else beta[..., None]

    t = q.shape[1]
    if t == 1:
        return _step(q, k, v, log_decay, state, a, b, beta)

    chunk = min(CHUNK_SIZE, t + -t % SUB_CHUNK_SIZE)
    q, k, v, log_decay, a, b, beta = (
        None if x is None else into_chunks(x, chunk) for x in (q, k, v, log_decay, a, b, beta)
    )
    from_start, to_end = since_start(log_decay).exp(), until_end(log_decay).exp()
    if beta is None:
        asks = F.pad(a[..., 1:, :], (0, 0, 0, 1))  # what a token asks before it writes, the one before asks behind it
        (y, scores), before_write = decayed_scores((q, asks), (k, b), log_decay)
        a_k, a_b = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in before_write)
        carried = since_start(log_decay, reads_before_write=True).exp() * a
        system, right = -a_b, torch.cat([a_k @ v, carried], dim=-1)
        writes, y, write = to_end * b, y @ v, (to_end * k).mT @ v
    else:
        (scores,), (k_k,) = decayed_scores((q, k), (k,), log_decay)
        system, right = beta * k_k, torch.cat([beta * v, -beta * from_start * k], dim=-1)
        writes, y, write = to_end * k, 0.0, 0.0

    # the solution is own + carried S
    solution = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, carried = solution.split([v.shape[-1], q.shape[-1]], dim=-1)
    keep = log_decay.sum(-2).exp().expand(*q.shape[:3], q.shape[-1])
    transition = keep.diag_embed() + writes.mT @ carried
    write = write + writes.mT @ own
    before = []
    for transition_n, write_n in zip(transition.unbind(2), write.unbind(2), strict=True):
        before.append(state)
        state = transition_n @ state + write_n
    y = y + scores @ own + (from_start * q + scores @ carried) @ torch.stack(before, dim=2)
    return from_chunks(y, t), state


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token, without the chunks."""
    q, k, v, decay, a, b, beta = (
        None if x is None else x.transpose(1, 2) for x in (q, k, v, log_decay.exp(), a, b, beta)
    )  # b h 1 d|e
    decayed = decay.mT * state
    write = b.mT * (a @ state) + k.mT * v if beta is None else k.mT * (beta * (v - k @ decayed))
    state = decayed + write
    return (q @ state).transpose(1, 2), state
