"""The tokenizer of a run: a published one by name, or one trained on the documents at hand."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zoo.files import whole_folder

END_OF_TEXT = "<|endoftext|>"
UNKNOWN_WORD = "<|unknown|>"
TRAINED_ON_THE_SPOT = ("bpe", "words")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the Hub or of a folder, which must have an end-of-text token.

    It gives what a zoo model takes, and neither cuts nor fills up texts, whatever its files ask for: a checkpoint of
    the run holds the same tokenizer, whether it was called before or not.

    Raises:
        ValueError: if there is none of that name, or it has no such token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, model_input_names=["input_ids", "attention_mask"])
    except (OSError, ValueError, KeyError) as error:  # the libraries' errors for a name, a folder, a file in it
        raise ValueError(f"data.tokenizer: cannot load {name!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data.tokenizer: {name!r} has no end-of-text token to stand between documents")
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def trained_tokenizer(
    kind: str, vocab_size: int, texts: Iterable[str], cache: Path, fingerprint: str
) -> PreTrainedTokenizerBase:
    """A tokenizer trained on texts, or the one that was trained on them before.

    Args:
        kind: "bpe" or "words".
        vocab_size: entries at most.
        texts: read only if there is no such tokenizer in the cache.
        cache: a folder.
        fingerprint: of the texts.
    """
    key = hashlib.sha256(json.dumps([kind, vocab_size, fingerprint]).encode()).hexdigest()[:20]
    folder = cache / f"tokenizer-{key}"
    if not folder.is_dir():
        train = train_bpe if kind == "bpe" else train_words
        with whole_folder(folder) as partial:
            train(texts, vocab_size).save_pretrained(partial)
    return AutoTokenizer.from_pretrained(folder)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (no unknown characters) of `vocab_size` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return _wrap(bpe)


def train_words(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words between spaces: the most frequent `vocab_size`, and one for all others."""
    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN_WORD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [END_OF_TEXT, UNKNOWN_WORD]
    words.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    return _wrap(words, unk_token=UNKNOWN_WORD)


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends, **special)


def count_entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows an embedding needs: ids may have gaps, so that the largest counts."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that changes when the tokenizer does: of its whole definition, or of its vocabulary and its class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {definition}".encode()).hexdigest()
