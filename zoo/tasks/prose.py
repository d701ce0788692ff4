"""Sentences to hide facts in, made offline: plain prose from a small grammar, or the same few sentences over and over.

A sentence is a list of words; its last one carries the full stop.
"""

import itertools

import numpy as np

DIGITS = list("0123456789")

NOISE = [
    sentence.split()
    for sentence in (
        "The grass is green.",
        "The sky is blue.",
        "The sun is yellow.",
        "Here we go.",
        "There and back again.",
    )
]
"""The filler of the passkey task (Mohtashami and Jaggi, 2023) and of RULER's first needle."""

_CLASSES = {
    "who": "farmer sailor teacher baker doctor painter widow merchant soldier gardener miller shepherd judge singer "
    "carpenter stranger captain weaver fisherman traveller neighbour blacksmith clerk nurse",
    "what": "basket letter lantern ladder blanket barrel candle saddle hammer kettle ribbon mirror coat boat cart bell "
    "rope map violin loaf ring chair drum window",
    "where": "river market harbour bridge mill forest castle village square chapel meadow station island tavern "
    "orchard valley lighthouse quarry",
    "how": "old young tired quiet proud clever honest lonely cheerful patient careful famous hungry stubborn gentle "
    "curious nervous weary",
    "kind": "heavy small broken silver wooden empty painted rusty narrow golden dusty precious plain crooked wet "
    "cheap borrowed forgotten",
    "did": "carried repaired sold found lost bought painted borrowed hid noticed dropped cleaned admired wanted "
    "brought forgot",
    "went": "walked hurried wandered rode returned travelled rushed limped",
    "when": "morning evening winter summer autumn spring night afternoon",
    "was": "was seemed became remained",
    "near": "near behind beside across beyond by",
}
_TEMPLATES = [
    template.split()
    for template in (
        "The {how} {who} {did} the {kind} {what} {near} the {where}.",
        "Every {when} the {who} {went} to the {where} and {did} a {what}.",
        "In the {when} the {where} {was} quiet, and the {who} {did} the {what}.",
        "The {who} {was} {how} because the {who} had {did} the {what}.",
        "A {how} {who} {went} {near} the {where} until the {when}.",
        "Nobody knew why the {who} {did} the {kind} {what} that {when}.",
        "The {what} {near} the {where} {was} {kind}.",
        "When the {who} {went} to the {where}, the {how} {who} {did} the {what}.",
    )
]


def _slots(template: list[str]) -> list[list[str]]:
    """For each place of a sentence, all the words that can stand there."""
    slots = []
    for word in template:
        name, brace, stop = word.removeprefix("{").partition("}")
        slots.append([filler + stop for filler in _CLASSES[name].split()] if brace else [word])
    return slots


_SENTENCES = [_slots(template) for template in _TEMPLATES]
_LONGEST = max(len(slots) for slots in _SENTENCES)


def prose(rng: np.random.Generator, length: int) -> list[list[str]]:
    """Sentences of `length` words in all, or a few fewer: as many as fit."""
    sentences, words = [], 0
    while True:
        for kind, *fillers in rng.integers(2**32, size=(256, 1 + _LONGEST)).tolist():
            slots = _SENTENCES[kind % len(_SENTENCES)]
            words += len(slots)
            if words > length:
                return sentences
            sentences.append([slot[filler % len(slot)] for slot, filler in zip(slots, fillers, strict=False)])


def noise(length: int) -> list[list[str]]:
    """The sentences of `NOISE` over and over, `length` words in all, or a few fewer: as many as fit."""
    ends = itertools.accumulate(len(sentence) for sentence in itertools.cycle(NOISE))
    fit = itertools.takewhile(lambda end: end <= length, ends)
    return [sentence for sentence, _ in zip(itertools.cycle(NOISE), fit, strict=False)]


def vocabulary() -> list[str]:
    """Every word of `prose` and `noise`, sorted."""
    slots = itertools.chain.from_iterable(_SENTENCES)
    return sorted({word for words in (*slots, *NOISE) for word in words})


def hide(rng: np.random.Generator, facts: list[list[str]], filler: list[list[str]]) -> list[str]:
    """The words of filler sentences with the facts at random places among them, in their order."""
    sentences = len(facts) + len(filler)
    places = set(rng.choice(sentences, len(facts), replace=False).tolist())
    facts, filler = iter(facts), iter(filler)
    return list(itertools.chain.from_iterable(next(facts if i in places else filler) for i in range(sentences)))
