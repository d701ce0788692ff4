"""Needles in a haystack, as in RULER (arXiv:2404.06654): numbers by key somewhere in a text, one key asked for."""

from dataclasses import dataclass

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option, prose

_KEYS = (
    "amber anchor arrow badge beacon beetle cactus canyon cedar comet copper coral crystal dagger desert diamond "
    "dragon eagle ember falcon feather ferry flute fossil galaxy garnet geyser glacier granite hazel helmet heron "
    "hornet iris ivory jaguar jasmine jungle kestrel lagoon laurel lemon lilac lizard magnet marble meteor nectar "
    "nutmeg oasis orchid otter oyster panther pebble pepper planet plum prism quartz raven saffron tulip walnut"
)
_TASK = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards."
)
_NEEDLE = "One of the special magic numbers for {key} is: {number} ."
_QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)


@dataclass(frozen=True)
class Options(TaskOptions):
    length: int = option(1024, 128, MAX_LENGTH)
    """Words of an example at most; there is as much haystack as fits."""
    haystack: str = option("prose", among=("noise", "prose"))
    """The same few sentences over and over (RULER's NIAH-single-1), or prose."""
    needles: int = option(1, 1, len(_KEYS.split()))
    """Keys with a number each, one of which is asked for."""
    digits: int = option(7, 1, 20)
    """Digits of a number, each a word."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.room < 0:
            raise ValueError(
                f"needles={self.needles} with digits={self.digits} need length={self.length - self.room} without any "
                f"haystack, it is {self.length}"
            )

    @property
    def room(self) -> int:
        """Words that are left for the haystack."""
        needles = self.needles * (len(_NEEDLE.split()) - 1 + self.digits)
        return self.length - len(_TASK.split()) - needles - len(_QUESTION.split()) - (self.digits - 1)


def draw(rng: np.random.Generator, options: Options) -> Example:
    keys = rng.choice(_KEYS.split(), options.needles, replace=False).tolist()
    numbers = [
        [prose.DIGITS[i] for i in row] for row in rng.integers(10, size=(options.needles, options.digits)).tolist()
    ]
    needles = [
        _NEEDLE.format(key=key, number=" ".join(number)).split() for key, number in zip(keys, numbers, strict=True)
    ]
    haystack = prose.noise(options.room) if options.haystack == "noise" else prose.prose(rng, options.room)
    asked = int(rng.integers(options.needles))
    question = _QUESTION.format(key=keys[asked]).split()
    return Example.with_answer([*_TASK.split(), *prose.hide(rng, needles, haystack), *question], numbers[asked])


def vocabulary(options: Options) -> list[str]:
    """The same whatever the options are."""
    fixed = " ".join([_TASK, _NEEDLE, _QUESTION, _KEYS]).split()
    return sorted({*fixed, *prose.DIGITS, *prose.vocabulary()} - {"{key}", "{number}"})
