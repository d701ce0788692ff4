"""The cells, and the scan one token at a time.

Letters: b batch, t tokens, s tensor of the state, h head, d channel, g gate.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]


def lstm(x: Tensor, recurrent: Tensor, state: State) -> State:
    """torch.nn.LSTM: gates i, f, g, o; state h, c. x and recurrent (b h 4*d) are what each gate gets."""
    _, c = state
    i, f, g, o = (x + recurrent).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(x: Tensor, recurrent: Tensor, state: State) -> State:
    """torch.nn.GRU: gates r, z, n; state h. x and recurrent (b h 3*d)."""
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    h_r, h_z, h_n = recurrent.chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((1 - z) * n + z * h,)


def slstm(x: Tensor, recurrent: Tensor, state: State) -> State:
    """arXiv:2405.04517, eq. 8-17: gates i, f, z, o; state h, c, n, m. x and recurrent (b h 4*d).

    c and n are relative to exp(m). Where n is 0 nothing has been written: m is then i, as the authors' code has it at
    the first token. The exponent of f is summed in this order because the rounding of the new m cancels in it.
    """
    _, c, n, m = state
    i, f, z, o = (x + recurrent).chunk(4, dim=-1)
    log_f = F.logsigmoid(f)
    empty = n == 0
    new_m = torch.where(empty, i, torch.maximum(log_f + m, i)).detach()
    i = (i - new_m).exp()
    f = ((m.detach() - new_m) + log_f).masked_fill(empty, -torch.inf).exp()
    c = f * c + i * z.tanh()
    n = f * n + i
    return o.sigmoid() * c / n, c, n, new_m


class Cell(NamedTuple):
    """One token of a cell, and how many gates and tensors of state it has; the first of these is h."""

    step: Callable[[Tensor, Tensor, State], State]
    gates: int
    states: int


CELLS = {"lstm": Cell(lstm, 4, 2), "gru": Cell(gru, 3, 1), "slstm": Cell(slstm, 4, 4)}


def cell_scan_reference(
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """x (b t h g*d), recurrent (h d g*d), bias (h g*d), state (b s h d), mask, starts (b t) -> h (b t h d), state."""
    outputs = []
    for t, x_t in enumerate(x.unbind(1)):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0.0)
        recurrent_t = torch.einsum("bhd,hdg->bhg", state[:, 0], recurrent)
        if bias is not None:
            recurrent_t = recurrent_t + bias
        after = torch.stack(CELLS[cell].step(x_t, recurrent_t, state.unbind(1)), dim=1)
        state = after if mask is None else torch.where(mask[:, t, None, None, None], after, state)
        outputs.append(state[:, 0])
    return torch.stack(outputs, dim=1), state
