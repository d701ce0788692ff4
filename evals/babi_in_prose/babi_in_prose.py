"""Questions about a small world (bAbI qa1 to qa3, arXiv:1502.05698), its facts hidden in prose (BABILong, 2406.10149).

People walk between rooms, take things along and leave them. The story tells every step; the answer is read off the
world, and always follows from the story.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option, prose

_PEOPLE = ["Mary", "John", "Sandra", "Daniel"]
_THINGS = ["apple", "football", "milk"]
_ROOMS = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
_STEPS = {
    "go": ["{who} moved to the {what}.", "{who} went to the {what}.", "{who} travelled to the {what}."],
    "take": ["{who} took the {what}.", "{who} grabbed the {what}.", "{who} picked up the {what}."],
    "leave": ["{who} dropped the {what}.", "{who} put down the {what}.", "{who} discarded the {what}."],
}
_QUESTIONS = {
    1: "Where is {who}? Answer:",
    2: "Where is the {what}? Answer:",
    3: "Where was the {what} before the {room}? Answer:",
}
_WORDS_OF_A_STEP = max(len(sentence.split()) for sentences in _STEPS.values() for sentence in sentences)


@dataclass(frozen=True)
class Options(TaskOptions):
    qa: int = option(1, 1, 3)
    """How many facts an answer needs: where a person is, where a thing is, where it was before."""
    facts: int = option(10, 1, 1000)
    """Steps that the story tells."""
    length: int = option(256, 16, MAX_LENGTH)
    """Words of an example at most; there is as much prose as fits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.facts < self.qa:
            raise ValueError(f"qa={self.qa} needs as many facts, facts={self.facts}")
        if self.room < 0:
            raise ValueError(f"facts={self.facts} need length={self.length - self.room}, it is {self.length}")

    @property
    def room(self) -> int:
        """Words that are left for prose."""
        return self.length - self.facts * _WORDS_OF_A_STEP - len(_QUESTIONS[self.qa].split())


def draw(rng: np.random.Generator, options: Options) -> Example:
    while True:
        world = _World(rng, with_things=options.qa > 1)
        facts = [world.step() for _ in range(options.facts)]
        if questions := world.questions(options.qa):
            question, answer = _pick(rng, questions)
            story = prose.hide(rng, facts, prose.prose(rng, options.room))
            return Example.with_answer([*story, *question.split()], [answer], _ROOMS)


def vocabulary(options: Options) -> list[str]:
    """The same whatever the options are."""
    stops = [f"{name}." for name in (*_THINGS, *_ROOMS)]
    names = {*_PEOPLE, *_THINGS, *_ROOMS, *stops, *(f"{name}?" for name in (*_PEOPLE, *_THINGS, *_ROOMS))}
    sentences = [*(sentence for kind in _STEPS.values() for sentence in kind), *_QUESTIONS.values()]
    fixed = {word for sentence in sentences for word in sentence.split() if "{" not in word}
    return sorted(names | fixed | set(prose.vocabulary()))


class _World:
    """People and things in rooms. What nobody was told, where a thing lies at first, is not asked for either."""

    def __init__(self, rng: np.random.Generator, with_things: bool):
        self.rng = rng
        self.room_of: dict[str, str] = {}
        """Of each person who has gone somewhere."""
        self.lying = {thing: _pick(rng, _ROOMS) for thing in _THINGS} if with_things else {}
        """The room of each thing that nobody holds."""
        self.holder: dict[str, str] = {}
        """Of each thing that does not lie."""
        self.visits: dict[str, list[str]] = {}
        """Of each thing that was ever taken, the rooms where it was from then on, each another than the one before."""

    def step(self) -> list[str]:
        """Someone does something that is possible; the sentence that tells it."""
        who = _pick(self.rng, _PEOPLE)
        room = self.room_of.get(who)
        reach = [thing for thing, where in self.lying.items() if where == room]
        held = [thing for thing, holder in self.holder.items() if holder == who]
        objects = {"go": [other for other in _ROOMS if other != room], "take": reach, "leave": held}
        kind = _pick(self.rng, [kind for kind, whats in objects.items() if whats])
        what = _pick(self.rng, objects[kind])
        if kind == "go":
            self.room_of[who] = what
            for thing in held:
                self.visits[thing].append(what)
        elif kind == "take":
            del self.lying[what]
            self.holder[what] = who
            self.visits.setdefault(what, [room])
        else:
            del self.holder[what]
            self.lying[what] = room
        return _pick(self.rng, _STEPS[kind]).format(who=who, what=what).split()

    def questions(self, qa: int) -> list[tuple[str, str]]:
        """Every question of the kind that the story answers, with the answer."""
        ask = _QUESTIONS[qa].format
        if qa == 1:
            return [(ask(who=who), room) for who, room in self.room_of.items()]
        if qa == 2:
            return [(ask(what=thing), rooms[-1]) for thing, rooms in self.visits.items()]
        return [
            (ask(what=thing, room=rooms[i]), rooms[i - 1])
            for thing, rooms in self.visits.items()
            for i in range(1, len(rooms))
            if rooms[i] not in rooms[i + 1 :]
        ]


def _pick(rng: np.random.Generator, among: list) -> Any:
    return among[rng.integers(len(among))]
