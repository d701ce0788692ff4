"""How well a model predicts a text, in units that do not depend on its tokenizer."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_SCORED = -100


class PositionScore(NamedTuple):
    """What the tokens of a text cost that stand at some positions."""

    start: int
    """Position of the first of them."""
    stop: int
    """Position behind the last."""
    loss: float
    """Mean negative log-likelihood, nats a token."""
    bits_per_byte: float
    """Their negative log-likelihood in bits over their length in UTF-8 bytes."""


def score_by_position(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int]
) -> list[PositionScore]:
    """Score a text in one pass, every token from all that stand before it, by bucket of position.

    The state is carried through the text, so that a recurrent model needs the same memory for any length. The first
    token is predicted from the end-of-text token. Where a bucket ends inside of a character its bytes are counted as
    three, those of U+FFFD.

    Args:
        model: a causal language model of the zoo.
        tokenizer: its tokenizer.
        text: what to score.
        edges: positions, in tokens, where another bucket begins; those beyond the text are left out.

    Raises:
        ValueError: if the text is empty, the tokenizer has no end-of-text token, or the edges do not ascend from 1.
    """
    if any(start >= stop for start, stop in pairwise([0, *edges])):
        raise ValueError(f"the edges of the buckets must ascend from 1, got {list(edges)}")
    ids = _encode(tokenizer, text)
    with _evaluating(model):
        pieces = [piece[0].cpu() for piece in log_probabilities(model, [ids], tokenizer.eos_token_id)]
    losses = -torch.cat(pieces)
    borders = [0, *(edge for edge in edges if edge < len(ids)), len(ids)]
    heads = [len(tokenizer.decode(ids[:edge], clean_up_tokenization_spaces=False).encode()) for edge in borders[1:-1]]
    scores = []
    for (start, stop), (first, last) in zip(pairwise(borders), pairwise([0, *heads, len(text.encode())]), strict=True):
        nats = losses[start:stop].double().sum().item()
        scores.append(PositionScore(start, stop, nats / (stop - start), nats / math.log(2) / (last - first)))
    return scores


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


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not text:
        raise ValueError("there is no text to score")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to predict the first token from")
    return tokenizer.encode(text, add_special_tokens=False)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
