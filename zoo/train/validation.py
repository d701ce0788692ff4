"""How well a model predicts text that it was not trained on, in units that do not depend on its tokenizer."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zoo.train.batches import count_rows, positions_in_documents, read_row
from zoo.train.store import IGNORED, TokenStore

_MOST_LOGITS = 2**27
"""Numbers; training computes its loss without them, and may take rows that leave no room for them."""


class Score(NamedTuple):
    """What a text costs under a model."""

    loss: float
    """Mean negative log-likelihood, nats a token."""
    bits_per_byte: float | None
    """Total negative log-likelihood in bits over the length of the text in UTF-8 bytes; None for a task, where only
    answers are predicted."""
    accuracy: float
    """Part of the tokens that are the model's first choice."""
    tokens: int


class Baseline(NamedTuple):
    """What a text costs under the best model that ignores context."""

    loss: float
    """Entropy of the frequencies of what is predicted, nats a token."""
    bits_per_byte: float | None


@torch.no_grad()
def validate(
    model: nn.Module,
    store: TokenStore,
    accelerator: Accelerator,
    sequence_length: int,
    rows_at_a_time: int,
    filler: int,
    isolate: bool,
    limit: int | None = None,
) -> Score:
    """Score a text in rows that do not share context; every process takes its share of them.

    Args:
        model: as it is trained, wrapped or not.
        store: the tokenised text.
        accelerator: the processes.
        sequence_length: tokens of a row.
        rows_at_a_time: that a process reads at most.
        filler: id that fills rows up.
        isolate: whether documents in a row are hidden from each other.
        limit: rows at most, spread evenly over the text; None: all of it.
    """
    was_training = model.training
    model.eval()
    vocab_size = accelerator.unwrap_model(model).config.vocab_size
    rows_at_a_time = max(1, min(rows_at_a_time, _MOST_LOGITS // (sequence_length * vocab_size)))
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens that were the first choice, tokens
    for ids, targets, positions in _batches(store, accelerator, sequence_length, rows_at_a_time, filler, limit):
        logits = model(input_ids=ids, position_ids=positions if isolate else None, use_cache=False).logits
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        counts = targets != IGNORED
        hits = (logits.argmax(-1) == targets) & counts
        total += torch.stack([nats.double(), hits.sum().double(), counts.sum().double()]).cpu()
    model.train(was_training)
    nats, hits, tokens = accelerator.reduce(total.to(accelerator.device), "sum").tolist()
    return Score(nats / tokens, _bits_per_byte(store, nats / tokens), hits / tokens, int(tokens))


def unigram_baseline(store: TokenStore) -> Baseline:
    """The entropy of what is predicted in a text."""
    _, targets, _ = store.read(0, store.tokens)
    counts = np.bincount(targets[targets != IGNORED])
    frequency = counts[counts > 0] / counts.sum()
    entropy = float(-(frequency * np.log(frequency)).sum())
    return Baseline(entropy, _bits_per_byte(store, entropy))


def _bits_per_byte(store: TokenStore, nats: float) -> float | None:
    """Of a text whose tokens, all but the first, cost so much each."""
    return None if store.has_targets else nats / math.log(2) * (store.tokens - 1) / store.text_bytes


def check_prompt(prompt: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if `train.sample_prompt` asks for samples, but has no tokens to begin with."""
    if prompt and not tokenizer(prompt)["input_ids"]:
        raise ValueError(f"train.sample_prompt {prompt!r} has no tokens: give a text that has, or null for no samples")


@torch.no_grad()
def generate_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A continuation of a prompt; all processes of a run draw the same, and no numbers of the training's."""
    was_training = model.training
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        ids = model.generate(
            **inputs, max_new_tokens=48, do_sample=True, temperature=0.8, pad_token_id=tokenizer.pad_token_id
        )
    model.train(was_training)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _batches(
    store: TokenStore,
    accelerator: Accelerator,
    length: int,
    rows_at_a_time: int,
    filler: int,
    limit: int | None,
) -> Iterator[list[Tensor]]:
    """Ids, targets and positions (b t) for this process; all get as many, since sharded models wait for each other."""
    rows = count_rows(store, length)
    chosen = np.linspace(0, rows - 1, min(rows, limit or rows)).round().astype(int)
    for start in range(0, len(chosen), rows_at_a_time * accelerator.num_processes):
        first = start + accelerator.process_index * rows_at_a_time
        read = [read_row(store, int(row), length, filler) for row in chosen[first : first + rows_at_a_time]]
        if not read:
            read = [(np.full(length, filler), np.full(length, IGNORED), np.arange(length) == 0)]
        columns = zip(*((ids, targets, positions_in_documents(begins)) for ids, targets, begins in read), strict=True)
        yield [torch.from_numpy(np.stack(column)).to(accelerator.device) for column in columns]
