"""Text that is never trained on: what a corpus holds out, or a file of the user's."""

from pathlib import Path

from datasets import Dataset

from zoo.errors import unknown_name
from zoo.train.corpora import read_corpus


def load(corpus: str, text: str, characters: int, **others) -> dict[str, Dataset]:
    """Documents of `characters` characters, the last one shorter, cut from one text.

    lm-eval calls it with the YAML's `metadata`; `others` is what of that is not about the documents.

    Args:
        corpus: a corpus of the zoo.
        text: the name of a text that it holds out, or the path of a UTF-8 file.
        characters: of a document; how far a model can look back.

    Raises:
        ValueError: on an unknown corpus, or a text that is neither held out nor a file.
    """
    if Path(text).is_file():
        whole = Path(text).read_text(encoding="utf-8")
    else:
        held_out = read_corpus(corpus).held_out
        if text not in held_out:
            raise unknown_name("held-out text or file", text, held_out)
        whole = held_out[text]
    pieces = [whole[start : start + characters] for start in range(0, len(whole), characters)]
    return {"test": Dataset.from_dict({"text": pieces})}
