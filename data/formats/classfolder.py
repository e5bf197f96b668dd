"""ImageNet-style class folder: one subfolder per class; labels follow the sorted folder names.

All-digit names are labels themselves (ImageNet-V2): `10` does not come between `1` and `2`. Class names come from
`classes`, from a file `classnames.txt` in the folder, or from the names of the subfolders. With a list of WordNet ids a
subset works too: the 200 folders of ImageNet-R or -A get their 200 names out of 1,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipress.data.formats.files import Files, images_under, needed
from clipress.data.prompts import read_classes, read_templates
from clipress.data.sources import FORMATS, Classes
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


@FORMATS.register("folder")
def read(spec: SourceSpec) -> Files:
    """Read labelled images from `images`."""
    root = needed(spec.images, "images", "folder", folder=True)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root}: expected one subfolder per class, found none.")
    numeric = all(name.isdecimal() for name in folders)
    labels = [int(name) for name in folders] if numeric else list(range(len(folders)))
    listed = spec.classes or next((file for file in [root / "classnames.txt"] if file.is_file()), None)
    if listed is not None:
        names = _names(root, listed, folders, numeric)
    elif numeric:
        raise DataError(
            f"{root}: expected class names for the numbered folders, found none. List them in classnames.txt there, one per "
            "line, or set 'classes'."
        )
    else:
        names = tuple(name.replace("_", " ") for name in folders)
    if max(labels) >= len(names):
        raise DataError(
            f"{listed}: expected more than {max(labels)} class names, since that is a label; found {len(names)}."
        )
    files = Files(spec, root, Classes(names, read_templates(spec.templates)))
    for folder, label in zip(folders, labels, strict=True):
        for path in images_under(root / folder):
            files.add(f"{folder}/{path}", (), where=f"{folder}/{path}", group=label)
    return files.done()


def _names(root: Path, listed: Path, folders: Sequence[str], numeric: bool) -> tuple[str, ...]:
    """Return the names in label order."""
    found = read_classes(listed)
    if numeric:
        return found.names
    if found.wnids is None:
        if len(found.names) != len(folders):
            raise DataError(
                f"{listed}: expected {len(folders)} class names, one per folder in {root}, found {len(found.names)}. For a "
                "subset of a longer list, use lines such as 'n01440764 tench'."
            )
        return found.names
    by_wnid = dict(zip(found.wnids, found.names, strict=True))
    strange = [name for name in folders if name not in by_wnid]
    if strange:
        raise DataError(f"{root}: {len(strange)} class folders are missing from {listed}, such as {strange[0]!r}.")
    return tuple(by_wnid[name] for name in folders)
