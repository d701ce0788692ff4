"""Text that is never trained on: what a corpus holds out, or a file of the user's; whole, or by position in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from zoo.errors import unknown_name
from zoo.tasks.harness import TaskGroup
from zoo.train.corpora import read_corpus


def load(corpus: str, text: str, characters: int, **others: Any) -> dict[str, Dataset]:
    """Documents of `characters` characters, the last one shorter, cut from one text.

    lm-eval calls it with the YAML's `metadata`; `others` is what of that is not about the documents.

    Args:
        corpus: a corpus of the zoo.
        text: the name of a text that it holds out, or the path of a UTF-8 file.
        characters: of a document; how far a model can look back.

    Raises:
        ValueError: on an unknown corpus, or a text that is neither held out nor a file.
    """
    whole = _read(corpus, text)
    pieces = [whole[start : start + characters] for start in range(0, len(whole), characters)]
    return {"test": Dataset.from_dict({"text": pieces})}


class ByPosition(TaskGroup):
    """A group of lm-eval tasks, one for each range of positions: what is there costs so much, given all before it.

    Of the metadata, `corpus` and `text` are those of `load`, and `ranges` are pairs of positions in characters, from
    the first up to the second: documents are as long as the last, and a task is named after where its range begins.

    Raises:
        ValueError: if the ranges do not ascend from 0, or overlap.
    """

    def __init__(self, config: Mapping[str, Any]):
        metadata = dict(config["metadata"])
        ranges = metadata.pop("ranges")
        borders = [position for pair in ranges for position in pair]
        if borders[0] < 0 or any(start >= stop for start, stop in ranges) or borders != sorted(borders):
            raise ValueError(f"ranges of task {config['task']!r} must ascend from 0 and not overlap, got {ranges}")
        tasks = {str(start): {"start": start, "stop": stop, "characters": borders[-1]} for start, stop in ranges}
        super().__init__(config, metadata, tasks)


def load_range(corpus: str, text: str, characters: int, start: int, stop: int, **others: Any) -> dict[str, Dataset]:
    """What stands from `start` up to `stop` in each whole document of `characters`, and what stands before it.

    A border goes back to the space before it, so that no word is cut.

    Args:
        corpus, text, characters, others: as for `load`.
        start, stop: positions in a document.

    Raises:
        ValueError: as `load`, or if the text is shorter than a document.
    """
    whole = _read(corpus, text)
    documents = [whole[i : i + characters] for i in range(0, len(whole) - characters + 1, characters)]
    if not documents:
        raise ValueError(f"{text} has {len(whole):,} characters, the last range ends at {characters:,}")
    rows = []
    for document in documents:
        first, last = (_space_before(document, position) for position in (start, stop))
        rows.append({"before": document[:first], "there": document[first:last]})
    return {"test": Dataset.from_list(rows)}


def score_range(document: Mapping[str, str], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """The log-likelihood of a range in nats and its bytes, of which lm-eval makes bits a byte."""
    (nats, _), *_ = results
    return {"bits_per_byte": (nats, len(document["there"].encode()))}


def _read(corpus: str, text: str) -> str:
    if Path(text).is_file():
        return Path(text).read_text(encoding="utf-8")
    held_out = read_corpus(corpus).held_out
    if text not in held_out:
        raise unknown_name("held-out text or file", text, held_out)
    return held_out[text]


def _space_before(document: str, position: int) -> int:
    if position >= len(document):
        return len(document)
    return max(document.rfind(" ", 0, position + 1), 0)
