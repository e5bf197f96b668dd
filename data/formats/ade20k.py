"""ADE20K's scene parsing challenge, as it is unpacked: an 8-bit mask for every image, whose 0 is unlabelled and 1 to 150 are classes.

<images>/images/training/ADE_train_00000001.jpg     <images>/annotations/training/ADE_train_00000001.png
<images>/images/validation/...                      <images>/annotations/validation/...
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from clipress.data.formats.files import Files, images_under, needed
from clipress.data.prompts import read_classes, read_templates
from clipress.data.sources import FORMATS, Classes
from clipress.data.spec import SourceSpec
from clipress.data.transforms import IGNORED, size_from_header
from clipress.errors import DataError

FOLDERS = {"train": "training", "val": "validation", "test": "validation"}
NAME = Path("ade20k")


class Masks(Files):
    """Image files with a mask each."""

    has_masks = True
    masks: Path

    @property
    def has_texts(self) -> bool:
        return False

    def mask(self, index: int) -> np.ndarray:
        """Return the label of every pixel, uint8 [H, W]; 255 is unlabelled."""
        path = self.masks / Path(self.paths[index]).with_suffix(".png").name
        try:
            with Image.open(path, formats=["PNG"]) as file:
                values = np.asarray(file if file.mode in ("L", "P") else file.convert("L"), np.uint8)
        except Exception as error:  # arbitrary bytes can fail anywhere in a decoder
            raise DataError(f"{path} is not a readable mask: {error}.") from None
        size = size_from_header(self.root / self.paths[index])
        if values.shape != size[::-1]:
            raise DataError(
                f"{path}: expected a mask of {size[0]} x {size[1]} pixels, as its image has, found {values.shape[::-1]}."
            )
        labels = values - 1  # 0 becomes 255
        if (wrong := labels[(labels != IGNORED) & (labels >= len(self.classes.names))]).size:
            raise DataError(f"{path}: expected values up to {len(self.classes.names)}, found {int(wrong[0]) + 1}.")
        return labels


@FORMATS.register("ade20k")
def read(spec: SourceSpec) -> Masks:
    """Read the split of a folder like `ADEChallengeData2016`; `classes` names other classes in its layout."""
    home, split = needed(spec.images, "images", "ade20k", folder=True), FOLDERS[spec.split]
    root, masks = home / "images" / split, home / "annotations" / split
    for folder in (root, masks):
        needed(folder, "images", "ade20k", folder=True)
    classes = Classes(read_classes(spec.classes or NAME).names, read_templates(spec.templates))
    files = Masks(spec.model_copy(update={"images": root}), root, classes)
    files.masks = masks
    for number, path in enumerate(images_under(root)):
        files.add(path, (), where=path, group=number)
    return files.done()
