"""The short convolution as w shifted products: elementwise passes, fast on any device, and in the backward too."""

import torch
from torch import Tensor


def short_conv_chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x (b t d), weight (d w), bias (d), state (b w-1 d), starts (b t) -> y (b t d), state."""
    t, kept = x.shape[1], state.shape[1]
    if t == 1:
        inputs = torch.cat([state if starts is None else state.masked_fill(starts[..., None], 0.0), x], dim=1)
        y = (inputs * weight.T).sum(1, keepdim=True)
        return y if bias is None else y + bias, inputs[:, 1:]

    inputs = torch.cat([state, x], dim=1)
    weights = weight.unbind(1)
    y = x * weights[-1]
    if bias is not None:
        y = y + bias
    if starts is not None:
        place = torch.arange(t, device=x.device)
        age = place - torch.where(starts, place, -kept).cummax(dim=1).values  # tokens of the document before this one
    for lag in range(1, kept + 1):
        earlier = inputs[:, kept - lag : kept - lag + t]
        if starts is not None:
            earlier = earlier.masked_fill((age < lag)[..., None], 0.0)
        y = torch.addcmul(y, earlier, weights[kept - lag])
    newest = inputs[:, t:].clone()  # a view would hold on to all of them
    return y, keep_document(newest, starts, t - kept)


def keep_document(inputs: Tensor, starts: Tensor | None, first: int | Tensor) -> Tensor:
    """Put 0 for what stands before the row's last document.

    Args:
        inputs: of a few consecutive places, (b k d).
        starts: (b t), True where a document begins; None: nowhere.
        first: the place of the first of them, the same for all rows or (b).
    """
    if starts is None:
        return inputs
    begin = torch.where(starts, torch.arange(starts.shape[1], device=starts.device), -inputs.shape[1]).amax(dim=1)
    place = (first - begin)[:, None] + torch.arange(inputs.shape[1], device=starts.device)  # in the document
    return inputs.masked_fill((place < 0)[..., None], 0.0)
