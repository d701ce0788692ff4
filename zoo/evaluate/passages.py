"""Log-likelihoods of continuations, each after a context: what is read when, and what is read once for several."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Score = tuple[float, bool]
"""The log-likelihood of a continuation in nats, and whether greedy search gives it."""


@dataclass
class Passage:
    """Tokens that are read in one go, and what is scored on the way. Requests are named by their places in a list."""

    tokens: list[int]
    ends: dict[int, list[int]] = field(default_factory=dict)
    """By request, tokens that the last logits of the passage are to predict."""
    branches: dict[int, list[int]] = field(default_factory=dict)
    """By request, tokens to read from the state behind the passage, all but the first to be predicted."""


def plan(requests: Sequence[tuple[list[int], list[int]]], shared_from: int | None) -> list[Passage]:
    """What to read for requests of context and continuation.

    A context of `shared_from` tokens or more is read once for its continuations; a shorter one, or any if that is None,
    with each of them, but once for those that differ in their last token only.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(requests):
        by_context.setdefault(tuple(context), []).append(i)
    passages = []
    for context, members in by_context.items():
        apart: dict[tuple[int, ...], Passage] = {}
        for i in members:
            tokens = (*context, *requests[i][1][:-1])
            apart.setdefault(tokens, Passage(list(tokens))).ends[i] = requests[i][1]
        if len(apart) > 1 and shared_from is not None and len(context) >= shared_from:
            ends = {i: requests[i][1][:1] for i in members}
            branches = {i: requests[i][1] for i in members if len(requests[i][1]) > 1}
            passages.append(Passage(list(context), ends, branches))
        else:
            passages.extend(apart.values())
    return passages


@torch.no_grad()
def read(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    rows: Callable[[int], int],
    columns: int | None,
    dtype: torch.dtype | None,
) -> list[tuple[int, Score]]:
    """Read passages side by side, then what branches off.

    Args:
        model: a causal language model of the zoo, in evaluation mode.
        passages: what to read.
        rows: how many rows of so many tokens, those of the state among them, may continue at once.
        columns: tokens of a row that a call reads at most, so that memory does not grow with the length; None: all.
        dtype: of the log-softmax; None: that of the logits, or float32 if they are less precise.

    Returns:
        Requests, some more than once, each with a score that is to be added to what the others say of it.
    """
    ids, mask = _pad_left([passage.tokens for passage in passages], model.device)
    ends = [(row, i, tokens) for row, passage in enumerate(passages) for i, tokens in passage.ends.items()]
    branches = [(row, i, tokens) for row, passage in enumerate(passages) for i, tokens in passage.branches.items()]
    branches.sort(key=lambda branch: -len(branch[2]))
    kept = max(len(tokens) for _, _, tokens in ends)
    outputs = _read_in_pieces(model, ids, mask, kept, columns, use_cache=bool(branches))
    scores = _score(outputs.logits, ends, dtype)
    while branches:
        count = rows(ids.shape[1] + len(branches[0][2]))
        part, branches = branches[:count], branches[count:]
        origins = [row for row, _, _ in part]
        more, more_mask = _pad_left([tokens[:-1] for _, _, tokens in part], model.device)
        fork = _fork(outputs.past_key_values, origins)
        whole_mask = torch.cat([mask[origins], more_mask], dim=1)
        logits = model(more, attention_mask=whole_mask, past_key_values=fork).logits
        scores += _score(logits, [(row, i, tokens[1:]) for row, (_, i, tokens) in enumerate(part)], dtype)
    return scores


def _read_in_pieces(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, kept: int, columns: int | None, use_cache: bool
) -> CausalLMOutputWithPast:
    """What the model returns behind ids (b t), with the logits of the last `kept` of them."""
    t = ids.shape[1]
    head = 0 if columns is None else max(0, t - max(columns, kept))
    cache = None
    for start in range(0, head, columns or 1):
        stop = min(start + columns, head)
        cache = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
    return model(ids[:, head:], attention_mask=mask, past_key_values=cache, use_cache=use_cache, logits_to_keep=kept)


def _score(
    logits: Tensor, asked: Sequence[tuple[int, int, list[int]]], dtype: torch.dtype | None
) -> list[tuple[int, Score]]:
    """Scores of (row, request, tokens) triples: the last logits of the row, of logits (b n v), predict the tokens."""
    dtype = dtype or torch.promote_types(logits.dtype, torch.float32)
    log_p, greedy = F.log_softmax(logits, dim=-1, dtype=dtype), logits.argmax(dim=-1)
    sums, agree = [], []
    for row, _, tokens in asked:
        targets = torch.tensor(tokens, device=logits.device)
        sums.append(log_p[row, -len(tokens) :].gather(-1, targets[:, None]).sum())
        agree.append((greedy[row, -len(tokens) :] == targets).all())
    found = zip(torch.stack(sums).tolist(), torch.stack(agree).tolist(), strict=True)
    return [(i, score) for (_, i, _), score in zip(asked, found, strict=True)]


def _pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (b t) with padding in front, and the mask (b t)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _fork(cache: Cache, rows: list[int]) -> Cache:
    """A cache that continues from those rows of another, which stays as it is."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    fork.batch_select_indices(rows)
    return fork
