"""The cells in PyTorch with few kernels a token: one batched product of all heads, then the gates.

Nothing of a nonlinear cell can be computed ahead of its token but what it gets from the input, and that is in `x`
already: there are no chunks. Heads come first, (h b d), as the product wants them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]


def cell_scan_chunked(
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """x (b t h g*d), recurrent (h d g*d), bias (h g*d), state (b s h d), mask, starts (b t) -> h (b t h d), state."""
    step = _STEPS[cell]
    if bias is None:
        bias = recurrent.new_zeros(())
    elif cell == "gru":
        bias = bias[:, None]  # h 1 g*d
    else:
        x = x + bias
    tokens = x.permute(1, 2, 0, 3).unbind(0)  # h b g*d each
    masks, starts = (_of_each_token(flags, len(tokens)) for flags in (mask, starts))
    states = tuple(part.transpose(0, 1) for part in state.unbind(1))
    outputs = []
    for x_t, mask_t, start_t in zip(tokens, masks, starts, strict=True):
        if start_t is not None:
            states = tuple(part.masked_fill(start_t, 0.0) for part in states)
        after = step(x_t, recurrent, bias, states)
        if mask_t is not None:
            after = tuple(torch.where(mask_t, *pair) for pair in zip(after, states, strict=True))
        states = after
        outputs.append(states[0])
    return torch.stack(outputs).permute(2, 0, 1, 3), torch.stack(states).permute(2, 0, 1, 3)


def _of_each_token(flags: Tensor | None, tokens: int) -> tuple[Tensor | None, ...]:
    """(b t) -> (b 1) of each token."""
    return (None,) * tokens if flags is None else flags[..., None].unbind(1)


def _lstm(x: Tensor, recurrent: Tensor, _: Tensor, state: State) -> State:
    h, c = state
    gates = torch.baddbmm(x, h, recurrent)
    i, f, _, o = gates.sigmoid().chunk(4, dim=-1)
    c = torch.addcmul(f * c, i, gates.chunk(4, dim=-1)[2].tanh())
    return o * c.tanh(), c


def _gru(x: Tensor, recurrent: Tensor, bias: Tensor, state: State) -> State:
    (h,) = state
    d = h.shape[-1]
    recurrent = torch.baddbmm(bias, h, recurrent)
    r, z = (x[..., : 2 * d] + recurrent[..., : 2 * d]).sigmoid().chunk(2, dim=-1)
    n = torch.addcmul(x[..., 2 * d :], r, recurrent[..., 2 * d :]).tanh()
    return (torch.lerp(n, h, z),)


def _slstm(x: Tensor, recurrent: Tensor, _: Tensor, state: State) -> State:
    h, c, n, m = state
    i, f, z, o = torch.baddbmm(x, h, recurrent).chunk(4, dim=-1)
    log_f = F.logsigmoid(f)
    with torch.no_grad():
        empty = n == 0
        before = m.masked_fill(empty, -torch.inf)
        m = torch.maximum(log_f + before, i)
        shift = before - m
    i, f = (i - m).exp(), (shift + log_f).exp()
    c = torch.addcmul(f * c, i, z.tanh())
    n = torch.addcmul(i, f, n)
    return o.sigmoid() * c / n, c, n, m


_STEPS: dict[str, Callable[[Tensor, Tensor, Tensor, State], State]] = {"lstm": _lstm, "gru": _gru, "slstm": _slstm}
