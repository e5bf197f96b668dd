"""*scenes*: drawn images of two or three objects, each with five differently worded captions.

A description is (layout, background, objects); an object is (shape, colour, size). No description occurs twice, so
retrieval has one right answer, and train / val / test share none. Everything else varies: position within the slot,
shade, brightness and noise.

The bytes depend on the seed alone: random numbers come from `numpy.random.RandomState`, whose stream is frozen (NEP 19),
and drawing uses integers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SIZE = 32  # pixels, both sides
SHAPES = ("circle", "square", "triangle", "cross")
MASK_CLASSES = ("background", *SHAPES)
COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 210, 50),
    "purple": (150, 50, 180),
    "orange": (240, 140, 40),
}
SIZES = {"small": 7, "large": 13}  # radius in half pixels
BACKGROUNDS = {"black": (20, 20, 20), "grey": (125, 125, 125), "white": (240, 240, 240)}

# Slots: name in captions and centre (x, y) in half pixels on the 64 x 64 drawing grid.
LAYOUTS = {
    "beside": (("left", (17, 32)), ("right", (47, 32))),
    "stacked": (("top", (32, 17)), ("bottom", (32, 47))),
    "trio": (("left", (17, 17)), ("right", (47, 17)), ("below", (32, 47))),
}
SPLITS = {"train": 6000, "val": 500, "test": 500}


@dataclass(frozen=True)
class Scene:
    """One description: a layout's name, a background's name and (shape, colour, size) per slot."""

    layout: str
    background: str
    objects: tuple[tuple[str, str, str], ...]


def descriptions() -> int:
    """Return the number of distinct descriptions."""
    kinds = len(SHAPES) * len(COLOURS) * len(SIZES)
    return sum(len(BACKGROUNDS) * kinds ** len(slots) for slots in LAYOUTS.values())


def random_scene(rng: np.random.RandomState) -> Scene:
    """Return a random description; half of them have three objects, and each two-object layout has a quarter."""
    layout = ("trio", "trio", "beside", "stacked")[rng.randint(4)]
    objects = tuple(
        (SHAPES[rng.randint(len(SHAPES))], list(COLOURS)[rng.randint(len(COLOURS))], list(SIZES)[rng.randint(2)])
        for _ in LAYOUTS[layout]
    )
    return Scene(layout, list(BACKGROUNDS)[rng.randint(len(BACKGROUNDS))], objects)


@lru_cache(maxsize=2)
def scenes(seed: int = 0) -> dict[str, tuple[Scene, ...]]:
    """Return every split's descriptions; none occurs twice, within a split or across them."""
    rng = np.random.RandomState(seed)
    unique: dict[Scene, None] = {}
    while len(unique) < sum(SPLITS.values()):
        unique.setdefault(random_scene(rng))
    drawn, splits, start = tuple(unique), {}, 0
    for split in ("test", "val", "train"):  # the test set stays the same when the training set grows
        splits[split] = drawn[start : start + SPLITS[split]]
        start += SPLITS[split]
    return splits


def captions(scene: Scene) -> tuple[str, ...]:
    """Return the five captions of a scene; each describes all of it."""
    slots = [name for name, _ in LAYOUTS[scene.layout]]
    things = [f"{size} {colour} {shape}" for shape, colour, size in scene.objects]
    big = {"small": "little", "large": "big"}
    words = [f"{big[size]} {colour} {shape}" for shape, colour, size in scene.objects]
    first, second = things[:2]
    where = {"beside": "left of", "stacked": "above", "trio": "left of"}[scene.layout]
    back = {"beside": "right of", "stacked": "under", "trio": "right of"}[scene.layout]
    third = f", {things[2]} below" if len(things) == 3 else ""
    ground = scene.background
    return (
        f"a {first} {where} a {second}{third}, {ground} background",
        f"on {ground}: a {second} {back} a {first}{third}",
        f"{ground} picture, " + ", ".join(f"{slot} a {thing}" for slot, thing in zip(slots, words, strict=True)),
        ", ".join(f"{word} {slot}" for slot, word in reversed(list(zip(slots, words, strict=True)))) + f" on {ground}",
        " and ".join(f"{thing} {slot}" for slot, thing in zip(slots, things, strict=True)) + f", {ground} backdrop",
    )


_Y, _X = np.mgrid[0 : 2 * SIZE, 0 : 2 * SIZE].astype(np.int64)


def _covered(shape: str, centre: tuple[int, int], radius: int) -> np.ndarray:
    """Return the mask of a shape on the double-size grid: bool [64, 64]."""
    dx, dy = _X - centre[0], _Y - centre[1]
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) * 8 <= radius * 7
    if shape == "triangle":
        return (dy <= radius * 3 // 4) & (2 * abs(dx) <= dy + radius)
    arm = max(radius // 3, 2)  # cross
    return ((abs(dx) <= arm) & (abs(dy) <= radius)) | ((abs(dy) <= arm) & (abs(dx) <= radius))


def draw(scene: Scene, rng: np.random.RandomState) -> np.ndarray:
    """Draw a scene: uint8 [32, 32, 3]."""
    return draw_both(scene, rng)[0]


def draw_both(scene: Scene, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene: uint8 [32, 32, 3], and what is where: places in MASK_CLASSES, uint8 [32, 32]."""
    canvas = np.empty((2 * SIZE, 2 * SIZE, 3), np.int64)
    canvas[:] = BACKGROUNDS[scene.background]
    labels = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    for (_, centre), (shape, colour, size) in zip(LAYOUTS[scene.layout], scene.objects, strict=True):
        jitter = rng.randint(-2, 3, size=2)
        covered = _covered(shape, (centre[0] + jitter[0], centre[1] + jitter[1]), SIZES[size] + rng.randint(-1, 2))
        canvas[covered] = np.asarray(COLOURS[colour]) + rng.randint(-18, 19, size=3)
        labels[covered] = MASK_CLASSES.index(shape)
    pixels = canvas.reshape(SIZE, 2, SIZE, 2, 3).sum((1, 3)) // 4
    pixels += rng.randint(-12, 13) + rng.randint(-10, 11, size=(SIZE, SIZE, 1))
    return pixels.clip(0, 255).astype(np.uint8), labels[1::2, 1::2]


def images(split: str, seed: int = 0) -> np.ndarray:
    """Draw all images of a split: uint8 [N, 32, 32, 3]."""
    return _drawn(split, seed)[0]


def masks(split: str, seed: int = 0) -> np.ndarray:
    """Return what is where in all images of a split: places in MASK_CLASSES, uint8 [N, 32, 32]."""
    return _drawn(split, seed)[1]


@lru_cache(maxsize=6)
def _drawn(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(1000 * (seed + 1) + sorted(SPLITS).index(split))
    drawn, labels = zip(*(draw_both(scene, rng) for scene in scenes(seed)[split]), strict=True)
    return np.stack(drawn), np.stack(labels)
