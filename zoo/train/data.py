"""Text that needs no download, a tokenizer trained on it, and batches that are a function of seed and step."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from zoo.errors import unknown_name

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and texts by name that are never trained on."""

    documents: list[str]
    held_out: dict[str, str]

    @property
    def sha256(self) -> str:
        """Hash of all of it, in order."""
        digest = hashlib.sha256()
        for text in (*self.documents, *self.held_out.values()):
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


def read_stdlib() -> Corpus:
    """The running Python's standard library without its tests and its generated character tables: about 10 MB.

    Held out are every twentieth of its files (`code`), and the language reference that `help()` shows (`prose`).
    """
    from pydoc_data.topics import topics  # noqa: PLC0415 (large, and only this corpus needs it)

    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "pydoc_data", "encodings", "__pycache__"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                texts.append(text)
    documents = [text for index, text in enumerate(texts) if index % 20]
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return Corpus(documents, {"code": "\n\n".join(texts[::20]), "prose": prose})


CORPORA: dict[str, Callable[[], Corpus]] = {"stdlib": read_stdlib}


def read_corpus(name: str) -> Corpus:
    """The corpus of that name.

    Raises:
        ValueError: on an unknown name, or if the corpus turns out empty on this machine.
    """
    if name not in CORPORA:
        raise unknown_name("corpus", name, CORPORA)
    corpus = CORPORA[name]()
    if not corpus.documents or not all(corpus.held_out.values()):
        raise ValueError(f"corpus {name!r} is empty on this machine")
    return corpus


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (no unknown characters) of `vocab_size` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer, length=len(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents as one row of token ids, the end-of-text token in front of each."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    pieces = [np.array([tokenizer.eos_token_id, *encoding.ids], dtype=np.int32) for encoding in encodings]
    return np.concatenate(pieces)


def into_rows(tokens: np.ndarray, length: int, batch_size: int) -> Tensor:
    """The tokens in rows of `length`, (rows length); an incomplete last row is left out.

    Raises:
        ValueError: if there are not enough rows for one batch.
    """
    rows = len(tokens) // length
    if rows < batch_size:
        raise ValueError(f"the corpus has {rows} rows of {length} tokens, a batch wants {batch_size}")
    return torch.from_numpy(tokens[: rows * length]).long().view(rows, length)


def batches(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches (batch_size length) of rows (rows length), without end.

    Each pass takes the rows in a new order, none of them twice; those that do not fill a last batch wait for another.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[order[start : start + batch_size]]
