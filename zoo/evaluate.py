"""How well a model predicts a text, in units that do not depend on its tokenizer."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextScore(NamedTuple):
    """What a text costs under a model, and under the best model that ignores context."""

    loss: float
    """Mean negative log-likelihood, nats a token."""
    bits_per_byte: float
    """Total negative log-likelihood in bits over the length of the text in UTF-8 bytes."""
    unigram_entropy: float
    """Entropy of the text's own token frequencies, nats a token."""
    unigram_bits_per_byte: float
    """The same in bits a byte."""
    tokens: int


@torch.no_grad()
def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int = 512,
    batch_size: int = 16,
) -> TextScore:
    """Score every token of a text once, each from at most `window` tokens before it in its window.

    The text is cut into windows that do not share context; the first token of the text is predicted from the
    end-of-text token, the first of another window from the last token of the window before.

    Raises:
        ValueError: if the text is empty or the tokenizer has no end-of-text token.
    """
    if not text:
        raise ValueError("there is no text to score")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to predict the first token from")
    was_training = model.training
    model.eval()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    inputs, targets = F.pad(ids[:-1], (1, 0), value=tokenizer.eos_token_id), ids
    total = 0.0
    for x, y in zip(inputs.split(window * batch_size), targets.split(window * batch_size), strict=True):
        whole = len(x) // window * window
        for part_x, part_y in ((x[:whole].view(-1, window), y[:whole]), (x[whole:][None], y[whole:])):
            if part_x.numel():
                logits = model(part_x.to(model.device), use_cache=False).logits
                total += F.cross_entropy(logits.flatten(0, 1).float(), part_y.to(model.device), reduction="sum").item()
    model.train(was_training)
    frequency = ids.bincount()[ids.unique()] / len(ids)
    entropy = -(frequency * frequency.log()).sum().item()
    bits_per_byte_per_nat = len(ids) / math.log(2) / len(text.encode())
    loss = total / len(ids)
    return TextScore(loss, loss * bits_per_byte_per_nat, entropy, entropy * bits_per_byte_per_nat, len(ids))
