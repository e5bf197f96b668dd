"""ImageNet-style class folder: one sub-folder per class; the sorted folders are the labels.

All-digit names are labels themselves (ImageNet-V2): `10` is not between `1` and `2`. Words for prompts come from
`classes`, from a file `classnames.txt` in the folder, or from the names of the sub-folders. A list that knows WordNet
ids names the folders it finds, so 200 folders of ImageNet-R or -A get their 200 names out of 1,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipress.data.formats.files import Files, needed, pictures_under
from clipress.data.prompts import read_classes, read_templates
from clipress.data.sources import FORMATS, Classes
from clipress.data.spec import SourceSpec
from clipress.errors import DataError


@FORMATS.register("folder")
def read(spec: SourceSpec) -> Files:
    """Read labelled pictures from `images`."""
    root = needed(spec.images, "images", "folder", folder=True)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root}: one sub-folder per class is asked for, found none.")
    numeric = all(name.isdecimal() for name in folders)
    labels = [int(name) for name in folders] if numeric else list(range(len(folders)))
    listed = spec.classes or next((file for file in [root / "classnames.txt"] if file.is_file()), None)
    if listed is not None:
        names = _names(root, listed, folders, numeric)
    elif numeric:
        raise DataError(
            f"{root}: its class folders are numbers; name the classes in classnames.txt there, one per line, or by "
            "'classes'."
        )
    else:
        names = tuple(name.replace("_", " ") for name in folders)
    if max(labels) >= len(names):
        raise DataError(f"{listed} names {len(names)} classes; there is a label {max(labels)}.")
    files = Files(spec, root, Classes(names, read_templates(spec.templates)))
    for folder, label in zip(folders, labels, strict=True):
        for path in pictures_under(root / folder):
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
                f"{listed} names {len(found.names)} classes, {root} has {len(folders)} class folders. A list that is "
                "longer must say which folder a name belongs to, by lines such as 'n01440764 tench'."
            )
        return found.names
    by_wnid = dict(zip(found.wnids, found.names, strict=True))
    strange = [name for name in folders if name not in by_wnid]
    if strange:
        raise DataError(f"{root}: {len(strange)} class folders are not in {listed}, such as {strange[0]!r}.")
    return tuple(by_wnid[name] for name in folders)
