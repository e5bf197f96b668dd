"""*statements* and *questions*: what can be said and asked about the images of *scenes*, right by their descriptions.

A statement compares the backgrounds of two images, and is true of half of the pairs that it is made for; a question has one answer. The texts depend on
the seed alone, as the images do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipress.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, SPLITS, Scene, scenes

TRUE_OF = {  # whether a statement is true, given whether the left and the right image show what it names
    "both images show {}": lambda left, right: left and right,
    "neither image shows {}": lambda left, right: not (left or right),
    "only the left image shows {}": lambda left, right: left and not right,
    "only the right image shows {}": lambda left, right: right and not left,
    "at least one image shows {}": lambda left, right: left or right,
}
THINGS = tuple(
    f"{'an' if words.startswith('orange') else 'a'} {words}"
    for words in (
        *SHAPES,
        *(f"{size} {shape}" for size in SIZES for shape in SHAPES),
        *(f"{colour} object" for colour in COLOURS),
        *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
        *(f"{ground} background" for ground in BACKGROUNDS),
    )
)
STATED = tuple(
    thing for thing in THINGS if thing.endswith("background")
)  # what a small model learns to judge in minutes
ANSWERS = tuple(sorted(["yes", "no", "0", "1", "2", "3", *COLOURS, *SHAPES, *SIZES, *BACKGROUNDS]))


@dataclass(frozen=True)
class Statement:
    """A statement about two images of a split, and whether it is true."""

    left: int
    right: int
    text: str
    is_true: bool


@dataclass(frozen=True)
class Question:
    """A question about an image of a split, and its answer."""

    image: int
    text: str
    answer: str


def shows(scene: Scene, thing: str) -> bool:
    """Return whether a scene shows one of THINGS."""
    *adjectives, noun = thing.split()[1:]
    if noun == "background":
        return scene.background == adjectives[0]
    return any({*adjectives, noun} - {"object"} <= set(kind) for kind in scene.objects)


def statements(split: str, seed: int = 0) -> list[Statement]:
    """Return as many statements about backgrounds as a split has images; half of them are true, whatever they say."""
    rng, drawn = _generator(split, seed), scenes(seed)[split]
    with_thing = {thing: np.asarray([shows(scene, thing) for scene in drawn]) for thing in STATED}
    found = []
    for half in rng.permutation(len(drawn)) % 2:
        text, thing = list(TRUE_OF)[rng.randint(len(TRUE_OF))], STATED[rng.randint(len(STATED))]
        is_true = bool(half)
        cases = [case for case in np.ndindex(2, 2) if bool(TRUE_OF[text](*case)) == is_true]
        case = cases[rng.randint(len(cases))]
        left, right = (_one_of(np.flatnonzero(with_thing[thing] == wanted), rng) for wanted in case)
        found.append(Statement(left, right, text.format(thing), is_true))
    return found


def questions(split: str, seed: int = 0) -> list[Question]:
    """Return a question for every image of a split."""
    rng, found = _generator(split, seed), []
    for image, scene in enumerate(scenes(seed)[split]):
        asked = _askable(scene, rng)
        text, answer = asked[rng.randint(len(asked))]
        found.append(Question(image, text, answer))
    return found


def _askable(scene: Scene, rng: np.random.RandomState) -> list[tuple[str, str]]:
    """Return a question of every kind that has one answer, with that answer."""
    shapes, colours, _ = zip(*scene.objects, strict=True)
    counted = SHAPES[rng.randint(len(SHAPES))]
    wanted = bool(rng.randint(2))
    thing = THINGS[_one_of([place for place, thing in enumerate(THINGS) if shows(scene, thing) == wanted], rng)]
    asked = [
        ("what color is the background ?", scene.background),
        (f"how many {counted.replace('cross', 'crosse')}s are there ?", str(shapes.count(counted))),
        (f"is there {thing} ?", "yes" if wanted else "no"),
    ]
    for shape, colour, size in scene.objects:
        if shapes.count(shape) == 1:
            asked += [(f"what color is the {shape} ?", colour), (f"what size is the {shape} ?", size)]
        if colours.count(colour) == 1:
            asked.append((f"what shape is the {colour} object ?", shape))
    return asked


def _one_of(places: Sequence[int] | np.ndarray, rng: np.random.RandomState) -> int:
    return int(places[rng.randint(len(places))])


def _generator(split: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState(2_000_000 + 1000 * seed + sorted(SPLITS).index(split))
