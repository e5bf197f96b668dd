"""NLVR2 as BLIP and UPop ship it: statements about two images, true or false (Suhr et al. 2019).

[{"images": ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"], "sentence": "Both show a dog.", "label": "True"}]

The images keep the order of the file, whereas BLIP also exchanges them at random when it evaluates.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import partial

from PIL import Image

from clipress.data.formats.files import Files, Strings, needed, rows_of
from clipress.data.formats.text import STATEMENT_WORDS, pre_caption
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.data.transforms import open_image

LABELS = {"True": 1, "False": 0}


class Statements(Files):
    """Pairs of image files with a statement each."""

    has_pairs = True

    def __init__(self, spec: SourceSpec, *args) -> None:
        super().__init__(spec, *args)
        self.others, self.labels = Strings(), array("b")

    def add_pair(self, first: str, other: str, sentence: str, label: int, where: str) -> None:
        """Add two images with a statement; both must exist and be inside the images folder."""
        if self.full or not self.is_usable(other, where):
            return
        before = len(self)
        self.add(first, (sentence,), where)
        if len(self) > before:
            self.others.append(other)
            self.labels.append(label)

    def content(self) -> Iterator[bytes | bytearray | array]:
        yield from super().content()
        yield from (self.others.bytes, self.others.ends, self.labels)

    def other_image(self, index: int) -> Image.Image:
        return open_image(self.root / self.others[index])

    def label(self, index: int) -> int:
        return self.labels[index]


@FORMATS.register("nlvr2")
def read(spec: SourceSpec) -> Statements:
    """Read an annotation file; image paths are relative to `images`, and `text_normaliser: blip` keeps 40 words."""
    path = needed(spec.annotations, "annotations", "nlvr2")
    rows = rows_of(path)
    found = Statements(spec, path)
    if spec.text_normaliser == "blip":
        found.normalised = partial(pre_caption, words=STATEMENT_WORDS)
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        images, sentence, label = (row.get(key) for key in ("images", "sentence", "label"))
        is_pair = isinstance(images, list) and len(images) == 2 and all(isinstance(image, str) for image in images)
        if is_pair and isinstance(sentence, str) and isinstance(label, str) and label in LABELS:
            found.add_pair(*images, sentence, LABELS[label], where=f"row {number}")
        else:
            found.skip(
                f"row {number}: expected two 'images', a 'sentence', and a 'label' that is \"True\" or \"False\""
            )
    return found.done()
