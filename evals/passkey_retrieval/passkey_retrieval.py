"""Passkey retrieval (Mohtashami and Jaggi, arXiv:2305.16300): one number in repeated filler, asked for at the end."""

from dataclasses import dataclass

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option
from zoo.tasks.prose import DIGITS, NOISE, hide, noise

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
_FACT = "The pass key is {number} . Remember it. {number} is the pass key."
_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Options(TaskOptions):
    length: int = option(1024, 128, MAX_LENGTH)
    """Words of an example at most; there is as much filler as fits."""
    digits: int = option(5, 1, 20)
    """Digits of the number, each a word."""


def draw(rng: np.random.Generator, options: Options) -> Example:
    number = [DIGITS[i] for i in rng.integers(10, size=options.digits).tolist()]
    task, fact, question = _TASK.split(), _FACT.format(number=" ".join(number)).split(), _QUESTION.split()
    room = options.length - len(task) - len(fact) - len(question) - (options.digits - 1)
    return Example.with_answer([*task, *hide(rng, [fact], noise(room)), *question], number)


def vocabulary(options: Options) -> list[str]:
    """The same whatever the options are."""
    fixed = " ".join([_TASK, _FACT, _QUESTION]).split()
    return sorted({*fixed, *DIGITS}.union(*NOISE) - {"{number}"})
