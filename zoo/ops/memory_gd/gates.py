"""What the weights and the surprise are made of, as the tokens of a chunk leave them: a matter of the gates alone.

Both recurrences are linear systems, each with ones on its diagonal and a gate beside, and are solved as they stand:
nothing is divided, no logarithm is taken, and a momentum or a 1 - decay of exactly 0 is as good as any.

Letters: b batch, t slot of a token, h head, n chunk, c slot in the chunk, m columns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gate_coefficients(
    step: Tensor, momentum: Tensor, decay: Tensor, real: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """The coefficients of what a chunk has before and of its gradients in what it leaves.

    Args:
        step, momentum, decay: the gates, (b t h).
        real: (b t), False at slots without a token, which leave everything as it is; None: every slot has one.
        width: how many slots a chunk has.

    Returns:
        Of the weights, at every token: the coefficients of minus each gradient of the chunk, of the surprise and of the
        weights before the chunk, (b h n c c+2). Of the surprise, at the last token: those of minus each gradient and of
        the surprise before, (b h n 1 c+1).
    """
    step, momentum, keep, real = _chunk_gates(step, momentum, decay, real, width)
    surprised = _surprise_of_tokens(step, momentum)
    learned = surprised if real is None else surprised * real[..., None]
    learned = _recur(keep, torch.cat([learned, _first_row(keep)], dim=-1))
    return learned, surprised[..., -1:, :]


def gate_gradients(
    grad_learned: Tensor,
    grad_surprised: Tensor,
    learned: Tensor,
    step: Tensor,
    momentum: Tensor,
    decay: Tensor,
    real: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of step, momentum and decay, given those of the coefficients and the first of these."""
    t = step.shape[1]
    step, momentum, keep, real = _chunk_gates(step, momentum, decay, real, width)
    surprised = _surprise_of_tokens(step, momentum)
    grad, grad_keep = _recur_backward(grad_learned, keep, learned)
    grad = grad[..., :-1] if real is None else grad[..., :-1] * real[..., None]
    grad = torch.cat([grad[..., :-1, :], grad[..., -1:, :] + grad_surprised], dim=-2)
    grad, grad_momentum = _recur_backward(grad, momentum, surprised)
    grad_step = grad.diagonal(dim1=-2, dim2=-1)
    found = (grad_step, grad_momentum, -grad_keep)
    if real is not None:
        found = (x * real for x in found)
    return tuple(x.flatten(2).transpose(1, 2)[:, :t] for x in found)


def into_chunks(x: Tensor, width: int) -> Tensor:
    """(b t h ...) -> (b h n c ...), zeros behind the end."""
    if behind := -x.shape[1] % width:
        x = F.pad(x, (*[0] * (2 * x.dim() - 4), 0, behind))
    return x.transpose(1, 2).unflatten(2, (-1, width))


def _chunk_gates(
    step: Tensor, momentum: Tensor, decay: Tensor, real: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """-> step, momentum, 1 - decay, which slots hold a token: (b h n c)."""
    if real is None and step.shape[1] % width:
        real = step.new_ones(step.shape[:2], dtype=torch.bool)
    step, momentum, keep = (into_chunks(x, width) for x in (step, momentum, 1 - decay))
    if real is not None:
        real = into_chunks(real[..., None], width)
        step, momentum, keep = step * real, momentum.masked_fill(~real, 1.0), keep.masked_fill(~real, 1.0)
    return step, momentum, keep, real


def _surprise_of_tokens(step: Tensor, momentum: Tensor) -> Tensor:
    """(b h n c) -> the coefficients of the surprise at every token, (b h n c c+1)."""
    return _recur(momentum, torch.cat([torch.diag_embed(step), _first_row(momentum)], dim=-1))


def _first_row(gate: Tensor) -> Tensor:
    """What the first token keeps of the state before the chunk: (b h n c) -> (b h n c 1), 0 but at the first."""
    return F.pad(gate[..., :1], (0, gate.shape[-1] - 1))[..., None]


def _recur(gate: Tensor, inputs: Tensor) -> Tensor:
    """x_t = gate_t x_{t-1} + inputs_t from x = 0: gate (b h n c), inputs (b h n c m) -> x (b h n c m)."""
    return torch.linalg.solve_triangular(_system(gate), inputs, upper=False, unitriangular=True)


def _recur_backward(grad: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the inputs of `_recur` and of the gate; the last column of the inputs is `_first_row(gate)`."""
    grad = torch.linalg.solve_triangular(_system(gate).mT, grad, upper=True, unitriangular=True)
    grad_gate = (grad[..., 1:, :] * x[..., :-1, :]).sum(-1)
    return grad, torch.cat([grad[..., 0, -1:], grad_gate], dim=-1)


def _system(gate: Tensor) -> Tensor:
    return torch.diag_embed(-gate[..., 1:], offset=-1)  # the diagonal of ones goes without saying
