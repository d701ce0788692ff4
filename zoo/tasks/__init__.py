"""Synthetic tasks, generated without end from a seed: the same examples train a model and, through lm-eval, score it.

A task is a folder of the evals shelf, `evals/<name>/`, found by a scan. Its module `<name>.py` has

- `Options(TaskOptions)`: what can be chosen, with defaults;
- `draw(rng, options) -> Example`: one example, all of its randomness from `rng`;
- `vocabulary(options) -> list[str]`: every word that may occur, for a word-level tokenizer;

and `<name>.yaml` makes an lm-eval task of it (`zoo.tasks.harness`).
"""

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from zoo.errors import unknown_name
from zoo.layout import shelf

MAX_LENGTH = 131_072
"""Words of the longest examples."""

SPLITS = ("train", "test")


class Example(NamedTuple):
    """One text and what must be predicted in it."""

    words: list[str]
    """The text is `" ".join(words)`."""
    targets: list[str | None]
    """As many as words: what must be predicted once `words[: i + 1]` are read. None where nothing is asked."""
    choices: Sequence[str] = ()
    """All answers there can be, where they are few; else empty, and an answer may be several words."""

    @classmethod
    def with_answer(cls, context: list[str], answer: list[str], choices: Sequence[str] = ()) -> "Example":
        """A context that nothing is asked in, and behind it an answer, each word of it asked for in turn."""
        return cls([*context, *answer[:-1]], [None] * (len(context) - 1) + answer, choices)

    @property
    def question(self) -> str:
        """The text up to where the answer begins."""
        return " ".join(self.words[: self._bounds[0] + 1])

    @property
    def answer(self) -> str:
        """The last target, and, unless there are choices, the targets in front of it that are its beginning."""
        first, last = self._bounds
        return " ".join(self.targets[first : last + 1])

    @property
    def _bounds(self) -> tuple[int, int]:
        last = max(index for index, target in enumerate(self.targets) if target is not None)
        first = last
        while not self.choices and first and self.targets[first - 1] == self.words[first]:
            first -= 1
        return first, last


def option(default: Any, least: int | None = None, most: int | None = None, among: Sequence[str] = ()) -> Any:
    """A field of `Options`: a number from `least` to `most`, or a name `among` these."""
    return dataclasses.field(default=default, metadata={"least": least, "most": most, "among": among})


@dataclass(frozen=True)
class TaskOptions:
    """Base of every task's `Options`; each field is an `option`.

    Raises:
        ValueError: if a value is of another type than the default, or out of range.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if type(value) is not type(field.default):
                raise ValueError(f"{field.name} is like {field.default!r}, not {value!r}")
            if limits["among"]:
                if value not in limits["among"]:
                    raise unknown_name(field.name, value, limits["among"])
            elif not limits["least"] <= value <= limits["most"]:
                raise ValueError(f"{field.name}={value} is not from {limits['least']} to {limits['most']}")


@dataclass(frozen=True)
class Task:
    """A synthetic task of the evals shelf."""

    name: str
    module: ModuleType

    def options(self, **options: Any) -> TaskOptions:
        """The task's options, checked.

        Raises:
            ValueError: on an unknown option, a wrong type, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(self.module.Options)}
        for name in options:
            if name not in known:
                raise unknown_name(f"option of task {self.name!r}", name, sorted(known))
        try:
            return self.module.Options(**options)
        except ValueError as error:
            raise ValueError(f"task {self.name!r}: {error}") from None

    def vocabulary(self, **options: Any) -> list[str]:
        """Every word that examples with these options may hold, each once."""
        return self.module.vocabulary(self.options(**options))

    def generate(self, split: str, seed: int, *, start: int = 0, **options: Any) -> Iterator[Example]:
        """Examples number `start`, `start + 1`, ... without end.

        An example is a function of its number and the arguments, so any of them can be had without those before it.
        No text is in both splits: a hash of the text says which it belongs to, and one of the other is drawn again.

        Raises:
            ValueError: on an unknown split or a bad option; later, if the options leave a split without examples.
        """
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        return self._generate(split, seed, start, self.options(**options))

    def _generate(self, split: str, seed: int, start: int, options: TaskOptions) -> Iterator[Example]:
        task = zlib.crc32(self.name.encode())
        for number in itertools.count(start):
            rng = np.random.default_rng([task, SPLITS.index(split), seed, number])
            for _ in range(1000):
                example = self.module.draw(rng, options)
                if _split_of(example) == split:
                    yield example
                    break
            else:
                raise ValueError(f"task {self.name!r} has too few examples for both splits with {options}")


def _split_of(example: Example) -> str:
    return SPLITS[hashlib.blake2b(" ".join(example.words).encode(), digest_size=1).digest()[0] % len(SPLITS)]


def list_tasks() -> list[str]:
    """The names of the tasks that can be generated, sorted."""
    return sorted(path.stem for path in shelf("evals").glob("*/*.py") if path.stem == path.parent.name)


@functools.cache
def load_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: on an unknown name.
    """
    if name not in list_tasks():
        raise unknown_name("task", name, list_tasks())
    spec = importlib.util.spec_from_file_location(f"zoo_task_{name}", shelf("evals") / name / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return Task(name, module)
