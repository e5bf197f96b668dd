"""Class lists and prompt templates, in the spellings used by open_clip, ImageNet and others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipress.errors import DataError
from clipress.storage import read_json

ADE20K = Path(__file__).with_name("ade20k.txt")
"""The classes of the scene parsing challenge, in the order of their labels."""
_PLACEHOLDER = re.compile(r"\{(?:c|label)?\}")
_WNID_LINE = re.compile(r"(n\d{8})\s+(\S.*)")


@dataclass(frozen=True)
class ClassList:
    """Class names in label order, with the WordNet ids that name their folders, if the list has them."""

    names: tuple[str, ...]
    wnids: tuple[str, ...] | None = None


def read_classes(source: Path) -> ClassList:
    """Read a class list: one name per line, or lines `WNID name`; `imagenet` is open_clip's list of 1,000, `ade20k` has 150."""
    if str(source) == "ade20k":
        source = ADE20K
    if str(source) == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data import ImageNetInfo

        return ClassList(tuple(IMAGENET_CLASSNAMES), tuple(ImageNetInfo().label_names()))
    lines = _lines(source)
    matches = [_WNID_LINE.fullmatch(line) for line in lines]
    if all(matches):
        return ClassList(tuple(match[2] for match in matches), tuple(match[1] for match in matches))
    return ClassList(tuple(lines))


def check_labels(labels: Sequence[str]) -> None:
    """Raise DataError for an empty list, blank labels and repeated labels."""
    if not labels:
        raise DataError("labels: expected at least one name, found none.")
    if not all(label.strip() for label in labels):
        raise DataError("labels: expected names, found a blank one. Remove it.")
    twice = sorted(label for label, count in Counter(labels).items() if count > 1)
    if twice:
        raise DataError(
            f"labels: expected distinct names, found repeated ones: {', '.join(twice)}. Remove the repetitions."
        )


def read_templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return templates with one `{}` each from `openai` (80), `simple` (7, both open_clip's) or templates themselves.

    `{c}` and `{label}` are other spellings of `{}`.
    """
    if given in ("openai", "simple"):
        import open_clip

        chosen = open_clip.OPENAI_IMAGENET_TEMPLATES if given == "openai" else open_clip.SIMPLE_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in chosen)
    return tuple(map(_template, [given] if isinstance(given, str) else given))


def _template(text: str) -> str:
    plain = _PLACEHOLDER.sub("{}", text)
    if plain.count("{}") != 1 or re.search(r"[{}]", plain.replace("{}", "")):
        raise DataError(
            f"Template {text!r}: expected one placeholder for the class name, written {{}}, {{c}} or {{label}}. "
            "`openai` and `simple` select open_clip's lists."
        )
    return plain


def prompts_by_class(names: Sequence[str], templates: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return every class with its prompts, in label order; a name may occur twice, and may contain braces."""
    return [(name, [template.replace("{}", name) for template in templates]) for name in names]


def read_prompts(path: Path) -> list[str]:
    """Read prompts: one per line, or JSON with a list of them or a mapping from classes to lists."""
    if path.suffix.lower() != ".json":
        return _lines(path)
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}.") from None
    rows = found.values() if isinstance(found, dict) else [found]
    prompts = [text for row in rows for text in (row if isinstance(row, list) else [row])]
    if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
        raise DataError(f"{path}: expected a list of prompts, or a mapping from classes to lists of prompts.")
    return prompts


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{path}: expected one entry per line, found none.")
    return lines
