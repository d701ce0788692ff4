"""The neural memory in chunks: products of whole chunks, never the weights of a single token (arXiv:2501.00663, 3.2).

In a chunk all gradients are taken at the anchor, so they are known beforehand: token i's, for each layer, is an outer
product u_i = x_i^T d_i of the layer's input and of the loss's gradient at its output. The rest is linear in them,

    M_t = a_t M + b_t S - sum_{i<=t} G_{t,i} u_i                      M, S before the chunk

with coefficients made of the gates alone, and to read it is an attention with weights G in place of a softmax:

    x M_t = a_t x M + b_t x S - sum_{i<=t} G_{t,i} (x . x_i) d_i

Letters: b batch, t slot of a token, h head, n chunk, c slot in the chunk, d key, e value, w all weights of a memory.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.memory_gd.gates import gate_coefficients, into_chunks
from zoo.ops.memory_gd.layers import join_layers, split_layers


def memory_gd_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: Tensor,
    surprise: Tensor,
    anchor: Tensor,
    initial: Tensor | None,
    real: Tensor | None,
    refresh: Tensor | None,
    reset: Tensor | None,
    hidden: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (b t h d), v (b t h e), step, momentum, decay (b t h), weights, surprise, anchor (b h w), initial (h w),
    real (b t), refresh, reset (b n) -> y (b t h e), weights, surprise, anchor."""
    t, d, e = q.shape[1], k.shape[-1], v.shape[-1]
    gates = gate_coefficients(step, momentum, decay, real, width)
    chunks = (x.unbind(2) for x in (*(into_chunks(x, width) for x in (q, k, v)), *gates))

    outputs = []
    for n, (q_n, k_n, v_n, learned, surprised) in enumerate(zip(*chunks, strict=True)):
        if reset is not None:
            weights = torch.where(reset[:, n, None, None], initial, weights)
            surprise = surprise.masked_fill(reset[:, n, None, None], 0.0)
        anchor = weights if refresh is None else torch.where(refresh[:, n, None, None], weights, anchor)
        gradients = _gradients(split_layers(anchor, d, e, hidden), k_n, v_n)
        states = zip(split_layers(weights, d, e, hidden), split_layers(surprise, d, e, hidden), strict=True)
        x, after = q_n, []
        for (weight, past), (inputs, errors) in zip(states, gradients, strict=True):
            if after:
                x = F.silu(x)
            of_gradients, of_past, of_weight = learned.split([learned.shape[-1] - 2, 1, 1], dim=-1)
            x = of_weight * (x @ weight) + of_past * (x @ past) - (of_gradients * (x @ inputs.mT)) @ errors
            last = learned[..., -1:, :]  # what the last token leaves is what the chunk leaves
            new_weight = last[..., -1:] * weight + last[..., -2:-1] * past - (last[..., :-2] * inputs.mT) @ errors
            new_past = surprised[..., -1:] * past - (surprised[..., :-1] * inputs.mT) @ errors
            after.append((new_weight, new_past))
        weights, surprise = (join_layers(matrices) for matrices in zip(*after, strict=True))
        outputs.append(x)
    y = torch.stack(outputs, dim=2).flatten(2, 3)  # b h t e
    return y.transpose(1, 2)[:, :t], weights, surprise, anchor


def forward(*inputs: Tensor | int | None) -> tuple[Tensor, ...]:
    """The same as one node of a graph, whose outputs are contiguous and no views."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in memory_gd_chunked(*inputs))


def backward(grads: list[Tensor], outputs: list[Tensor], *inputs: Tensor | int | None) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors among the inputs, of which everything is computed again."""
    count = len(inputs) - 2  # the last two are sizes
    places = [i for i, x in enumerate(inputs[:count]) if x is not None and x.is_floating_point()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        taken = dict(zip(places, tensors, strict=True))
        return memory_gd_chunked(*(taken.get(i, x) for i, x in enumerate(inputs)))

    _, pull_back = torch.func.vjp(run, *(inputs[i] for i in places))  # autograd is off inside of an operator
    found = {i: grad.contiguous() for i, grad in zip(places, pull_back(tuple(grads)), strict=True)}
    return tuple(found.get(i) for i in range(count))


def _gradients(layers: list[Tensor], k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of |M(k) - v|^2, for each layer (b h in out): its input (b h c in) and the gradient at its output (b h c out)."""
    inputs, slopes = [k], []
    for layer in layers[:-1]:
        x = inputs[-1] @ layer
        gate = torch.sigmoid(x)
        inputs.append(x * gate)
        slopes.append(gate * (1 + x * (1 - gate)))  # of silu
    errors = [2 * (inputs[-1] @ layers[-1] - v)]
    for layer, slope in zip(reversed(layers[1:]), reversed(slopes), strict=True):
        errors.append(errors[-1] @ layer.mT * slope)
    return list(zip(inputs, reversed(errors), strict=True))
