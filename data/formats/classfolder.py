"""ImageNet-style class folder: one sub-folder per class, named after it; the names are sorted.

All-digit names are labels themselves (ImageNet-V2): `10` is not between `1` and `2`. A file `classnames.txt` in the
folder, one name per line in label order, gives the words for prompts.
"""

from __future__ import annotations

from clipress.data.formats.files import Files, needed
from clipress.data.pairs import Classes, SourceSpec
from clipress.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def read(spec: SourceSpec) -> Files:
    """Read labelled pictures from `images`."""
    root = needed(spec.images, "images", "folder", folder=True)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root}: one sub-folder per class is asked for, found none.")
    numeric = all(path.name.isdigit() for path in folders)
    labels = {path: int(path.name) if numeric else label for label, path in enumerate(folders)}
    listed = root / "classnames.txt"
    if listed.is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif numeric:
        raise DataError(f"{root}: its class folders are numbers; name the classes in {listed.name}, one per line.")
    else:
        names = [path.name.replace("_", " ") for path in folders]
    if max(labels.values()) >= len(names):
        raise DataError(f"{listed} names {len(names)} classes; there is a label {max(labels.values())}.")
    files = Files(spec, root, classes=Classes(tuple(names), spec.templates))
    for folder, label in labels.items():
        texts = tuple(template.format(names[label]) for template in spec.templates)
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                files.add(str(path.relative_to(root)), texts, where=str(path), group=label)
    return files.done()
