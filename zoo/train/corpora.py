"""Text that needs no download: what the running Python, or a small package beside it, brings along."""

import ast
import bz2
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zoo.errors import unknown_name


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and texts by name that are never trained on."""

    documents: list[str]
    held_out: dict[str, str]

    @cached_property
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

    left_out = {"test", "tests", "idle_test", "site-packages", "pydoc_data", "encodings", "__pycache__"}
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in _modules("stdlib", left_out)]
    texts = [text for text in texts if text.strip()]
    documents = [text for index, text in enumerate(texts) if index % 20]
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return Corpus(documents, {"code": "\n\n".join(texts[::20]), "prose": prose})


def read_docstrings() -> Corpus:
    """The docstrings of the packages installed beside this one, a document a module; every twentieth is held out."""
    texts = list(filter(None, map(_docstrings, _modules("purelib", {"__pycache__", "tests"}))))
    return Corpus(
        [text for index, text in enumerate(texts) if index % 20], {"docstrings": "\n\n".join(texts[::20][:200])}
    )


def read_wikipedia() -> Corpus:
    """The articles that the package gensim brings for its tests, about 3 MB of English; every tenth is held out."""
    found = importlib.util.find_spec("gensim")
    if found is None:
        raise ValueError("corpus 'wikipedia' is in the package gensim: pip install gensim")
    articles = []
    for path in sorted(Path(found.origin).parent.glob("test/test_data/enwiki-*shortened.xml.bz2")):
        pages = bz2.decompress(path.read_bytes()).decode()
        articles += re.findall(r"<text[^>]*>(.*?)</text>", pages, re.DOTALL)
    texts = [text for article in articles if len(text := _without_markup(article)) > 500]
    documents = [text for index, text in enumerate(texts) if index % 10]
    return Corpus(documents, {"wikipedia": "\n\n".join(texts[::10])})


def read_wordnet() -> Corpus:
    """The words of WordNet with their glosses, a document a synset, from Debian's package wordnet-base."""
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        raise ValueError(f"corpus 'wordnet' reads {folder}/data.*: apt-get install wordnet-base")
    texts = []
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence, in front
                facts, gloss = line.split(" | ", 1)
                words = facts.split()
                names = [words[4 + 2 * i].replace("_", " ") for i in range(int(words[3], 16))]
                texts.append(f"{', '.join(names)}: {gloss.strip()}")
    return Corpus([text for i, text in enumerate(texts) if i % 50], {"wordnet": "\n".join(texts[::50])})


CORPORA: dict[str, Callable[[], Corpus]] = {
    "stdlib": read_stdlib,
    "docstrings": read_docstrings,
    "wikipedia": read_wikipedia,
    "wordnet": read_wordnet,
}


def read_corpus(name: str) -> Corpus:
    """The corpus of that name.

    Raises:
        ValueError: on an unknown name, or if the corpus is not on this machine or turns out empty.
    """
    if name not in CORPORA:
        raise unknown_name("corpus", name, CORPORA)
    corpus = CORPORA[name]()
    if not corpus.documents or not all(corpus.held_out.values()):
        raise ValueError(f"corpus {name!r} is empty on this machine")
    return corpus


def _modules(kind: str, left_out: set[str]) -> Iterator[Path]:
    """Python files below one of the interpreter's paths, in order, without the folders named."""
    root = Path(sysconfig.get_paths()[kind])
    return (path for path in sorted(root.rglob("*.py")) if left_out.isdisjoint(path.relative_to(root).parts))


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):  # templates, and sources of an older Python
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def _without_markup(article: str) -> str:
    """The prose of an article in wiki markup: no templates, tables, references, files; links as their text."""
    text = article.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<[^>]+>", "", text, flags=re.DOTALL)
    for opened in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):
        while (shorter := re.sub(opened, "", text)) != text:
            text = shorter
    text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"'{2,}|^[*#:;]+\s*|^=+\s*(.*?)\s*=+$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
