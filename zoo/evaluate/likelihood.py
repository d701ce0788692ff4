"""How well a model predicts long texts."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

_NOT_SCORED = -100


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], prefix: int, columns: int = 512
) -> Iterator[Tensor]:
    """The log-probability of every token from all before it, the state being carried from piece to piece.

    Args:
        model: a causal language model of the zoo, in evaluation mode.
        rows: the ids of the tokens of each text, the longest first.
        prefix: the token that the first of each row is predicted from.
        columns: tokens of a row that are read at once.

    Yields:
        (b w) in nats, float32 or more precise, for the next w <= columns tokens of the b rows that have any; 0 behind
        the end of a row.
    """
    lengths = [len(row) for row in rows]
    targets = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=_NOT_SCORED)
    inputs = F.pad(targets[:, :-1], (1, 0), value=prefix).clamp(min=0)  # padding stands behind all that is scored
    cache = None
    for start in range(0, lengths[0], columns):
        alive = sum(length > start for length in lengths)
        if cache is not None and alive < len(inputs):
            cache.batch_select_indices(list(range(alive)))
        inputs, targets = inputs[:alive], targets[:alive]
        x, y = (ids[:, start : start + columns].to(model.device) for ids in (inputs, targets))
        outputs = model(x, past_key_values=cache, use_cache=start + columns < lengths[0])
        cache = outputs.past_key_values
        logits = outputs.logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        yield -F.cross_entropy(logits, y.flatten(), ignore_index=_NOT_SCORED, reduction="none").view_as(y)
