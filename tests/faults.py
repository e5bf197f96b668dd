"""Hostile and broken inputs, one function each: it writes the input to a folder, uses it and returns the outcome.

`python tests/faults.py FILE` writes one row per input: what was expected and what happened.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime  # noqa: F401 - must be loaded before memory is limited
import torch
import yaml
from click.testing import CliRunner
from helpers import RECIPE
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save

from clipress.artifact import load_artifact, read_header, save_artifact
from clipress.cli import main
from clipress.data.cache_files import Manifest, Rows, write_manifest, write_shard
from clipress.data.formats.webdataset import shard_paths
from clipress.data.prompts import check_labels, read_classes, read_prompts
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.teacher_cache import TeacherCache
from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import Preprocess, fitted, open_image
from clipress.errors import ClipressError
from clipress.models.importers import import_checkpoint
from clipress.models.load import artifact_from_model, new_model
from clipress.recipe import read_recipe
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import open_session
from clipress.runtime.tensorrt import load_engine
from clipress.storage import sha256
from clipress.studies.methods import read_study
from clipress.tasks import model_from_artifact

MEMORY = 1 << 30  # Bytes of address space that one input may cost.


@dataclass(frozen=True)
class Fault:
    """An input: `make` uses it in a folder, `expected` is a pattern that the outcome must match."""

    name: str
    expected: str
    make: Callable[[Path], Any]

    def happened(self, folder: Path) -> str:
        """Return the outcome within the memory limit; any error other than a ClipressError is raised."""
        with limited(MEMORY):
            try:
                return f"accepted: {self.make(folder)}"
            except ClipressError as error:
                assert error.exit_code == 2 and len(str(error)) < 5000
                return f"refused: {str(error).replace(str(folder), '.')}"


FAULTS: list[Fault] = []


def fault(name: str, expected: str) -> Callable:
    """Add a function to the table."""

    def add(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        FAULTS.append(Fault(name, expected, make))
        return make

    return add


@contextmanager
def limited(extra: int) -> Any:
    """Limit the process to this many more bytes of address space."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)


def cli(*arguments: object) -> str:
    """Run a command; exit code 2 becomes a ClipressError, and a traceback is raised again."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 2:
        raise ClipressError(f"with exit code 2: {result.output}")
    return f"exit code {result.exit_code}: {result.output}"


# images


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (8, 6), **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, "red" if mode in ("RGB", "P", "CMYK") else 0).save(buffer, form, **settings)
    return buffer.getvalue()


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [header, b"IDAT" + zlib.compress(data), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def tiff_of(width: int, height: int) -> bytes:
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1), (278, height), (279, 4)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return (b"II*\0" + struct.pack("<I", 8) + body + b"\0" * 4).ljust(204, b"\0")


def webp_of(width: int, height: int) -> bytes:
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\0" * 4
    chunk += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk += encoded("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def open_as_image(data: bytes, name: str = "a.png") -> Callable[[Path], Any]:
    def open_one(folder: Path) -> Any:
        (folder / name).write_bytes(data)
        image = open_image(folder / name)
        return f"{image.mode} {image.size} {np.asarray(image).reshape(-1, 3)[0].tolist()}"

    return open_one


NO_IMAGE = "refused: .*is not a readable image"
for _name, _expected, _data in (
    ("a truncated JPEG", NO_IMAGE, encoded("JPEG", size=(64, 64))[:300]),
    ("a truncated PNG", NO_IMAGE, encoded("PNG", size=(64, 64))[:60]),
    ("a truncated WebP", NO_IMAGE, encoded("WEBP")[:-10]),
    ("an image of zero bytes", NO_IMAGE, b""),
    ("a text file as an image", NO_IMAGE, b"not an image"),
    ("a web page as an image", NO_IMAGE, b"<html>404</html>"),
    ("a PNG named .jpg", r"accepted: RGB \(8, 6\) \[255, 0, 0\]", encoded("PNG")),
    ("a CMYK JPEG", r"accepted: RGB \(8, 6\)", encoded("JPEG", "CMYK")),
    ("a palette PNG", r"accepted: RGB \(8, 6\)", encoded("PNG", "P")),
    ("a 16-bit PNG", r"accepted: RGB \(8, 6\) \[0, 0, 0\]", encoded("PNG", "I;16")),
    ("a PNG with an alpha channel", r"accepted: RGB \(8, 6\)", encoded("PNG", "RGBA")),
    ("a float TIFF", "refused: .*found floating-point ones", encoded("TIFF", "F")),
    ("a 32-bit TIFF", "refused: .*found 32-bit or signed integer ones", encoded("TIFF", "I")),
    ("a PNG header of 50,000 x 50,000 pixels", "refused", png_of(50_000, 50_000)),
    ("a PNG header of 4 billion pixels a side", "refused", png_of((1 << 31) - 1, (1 << 31) - 1)),
    ("a TIFF header of 50,000 x 50,000 pixels", "refused", tiff_of(50_000, 50_000)),
    ("a WebP header of 16,000 x 16,000 pixels", "refused", webp_of(16_000, 16_000)),
    ("a WebP header of 16 million pixels a side", "refused", webp_of(1 << 24, 1 << 24)),
    (
        "a PNG of 1 x 100,000 pixels",
        "refused: .*expected an aspect of at most 100 to 1",
        png_of(1, 100_000, b"\0\0\0\0" * 100_000),
    ),
    ("an image without width", "refused", png_of(0, 5)),
    ("an SVG", NO_IMAGE, b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    ("an EPS, which starts Ghostscript", NO_IMAGE, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
):
    FAULTS.append(Fault(_name, _expected, open_as_image(_data, "a.jpg" if _name.endswith(".jpg") else "a.png")))


@fault("a JPEG with an EXIF rotation", r"accepted: RGB \(6, 8\)")
def _(folder: Path) -> Any:
    exif = Image.Exif()
    exif[274] = 6
    return open_as_image(encoded("JPEG", exif=exif))(folder)


@fault("random bytes as EXIF data", r"accepted: RGB \(8, 6\)")
def _(folder: Path) -> Any:
    return open_as_image(encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xee" * 200))(folder)


@fault("an animated GIF", r"accepted: RGB \(8, 6\) \[255, 0, 0\]")
def _(folder: Path) -> Any:
    return open_as_image(encoded("GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")]))(folder)


@fault("an animated PNG", r"accepted: RGB \(8, 6\) \[255, 0, 0\]")
def _(folder: Path) -> Any:
    return open_as_image(encoded("PNG", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")]))(folder)


@fault("a folder as an image", "refused: .*not a readable image")
def _(folder: Path) -> Any:
    return open_image(folder)


@fault("an image with a NUL in its name", "refused: .*not a readable image")
def _(folder: Path) -> Any:
    return open_image(folder / "a\0.png")


# tables and annotations


def opened(folder: Path, form: str, content: str | bytes, **spec: Any) -> str:
    """Open a source beside nine images and report what it holds."""
    for name in "abcdefghi":
        (folder / f"{name}.png").write_bytes(encoded("PNG"))
    path = folder / "table"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    open_source.cache_clear()
    source = open_source(SourceSpec(format=form, annotations=path, images=folder, **spec))
    first = source.captions(0)[0][:20] if source.has_texts else ""
    if source.has_texts:
        tokenizer_from_spec({"name": "clip-bpe", "context_length": 77})(source.captions(0))
    return f"{len(source)} records, {source.skipped} skipped ({source.first_skipped}), first {first!r}"


def csv_of(*rows: str, more: int = 8) -> str:
    return "title\tfilepath\n" + "".join(
        f"{row}\n" for row in (*rows, *(f"red\t{name}.png" for name in "bcdefghi"[:more]))
    )


for _name, _expected, _rows in (
    ("a caption with NULs", r"9 records, 0 skipped \(\), first 'a\\x00b'", ("a\0b\ta.png",)),
    ("a caption of 1 MB", "9 records, 0 skipped", ("x" * 1_000_000 + "\ta.png",)),
    ("a caption of lone surrogates", "refused: .*expected text in utf-8", ("\ud800\ta.png",)),
    ("an empty caption", r"8 records, 1 skipped \(line 2: empty caption", (" \ta.png",)),
    ("a missing file", r"8 records, 1 skipped \(line 2: no such file: gone.png", ("red\tgone.png",)),
    ("a path outside the image folder", r"8 records, 1 skipped \(line 2: .*is outside", ("red\t../../etc/passwd",)),
    ("an absolute path", r"8 records, 1 skipped \(line 2: .*is outside", ("red\t/etc/passwd",)),
    ("a path with a NUL", "8 records, 1 skipped", ("red\ta\0.png",)),
    ("a path of 10,000 letters", "8 records, 1 skipped", ("red\t" + "a" * 10_000,)),
    ("a row with too many cells", r"8 records, 1 skipped \(line 2: expected 2 cells, found 3", ("red\ta.png\tx",)),
    ("a table whose files are all missing", "refused: .*10 of 18 records cannot be used", ("red\tgone.png",) * 10),
):
    FAULTS.append(Fault(_name, _expected, lambda f, rows=_rows: opened(f, "csv", csv_of(*rows))))


@fault("a table with a byte order mark", "8 records, 0 skipped")
def _(folder: Path) -> Any:
    return opened(folder, "csv", "\ufeff" + csv_of())


@fault("a table that is not UTF-8", "refused: .*expected text in utf-8, .*encoding")
def _(folder: Path) -> Any:
    return opened(folder, "csv", csv_of("@\ta.png").encode().replace(b"@", b"caf\xe9"))


@fault("an unclosed quote that swallows lines", "refused: .*8 of 10 records cannot be used")
def _(folder: Path) -> Any:
    rows = ["title,filepath", "red,a.png", "red,a.png", '"red,a.png', *["blue,b.png"] * 7]
    return opened(folder, "csv", "\n".join(rows) + "\n", separator=",")


@fault("a quoted cell of 200,000 letters", r"9 records, 1 skipped \(line 2: .*field larger")
def _(folder: Path) -> Any:
    rows = ["title,filepath", f'"{"x" * 200_000}",a.png', *(f"blue,{name}.png" for name in "abcdefghi")]
    return opened(folder, "csv", "\n".join(rows) + "\n", separator=",")


@fault("a line of 17 million letters", "refused: .*not a table")
def _(folder: Path) -> Any:
    return opened(folder, "csv", b"x" * (17 << 20))


@fault("an empty table", "refused: .*expected a header with")
def _(folder: Path) -> Any:
    return opened(folder, "csv", b"")


@fault("a folder as a table", "refused: .*no such file")
def _(folder: Path) -> Any:
    return open_source(SourceSpec(format="csv", annotations=folder, images=folder))


ROWS = [{"image": f"{name}.png", "caption": "red"} for name in "abcdefghi"]
DEEP = "[" * 100_000 + "]" * 100_000
for _name, _form, _expected, _content in (
    ("JSON nested 100,000 deep", "karpathy", "refused: .*nests deeper", DEEP),
    ("truncated JSON", "coco", "refused: .*not readable JSON", '{"images": [{"id":'),
    ("JSON with a number of 5,000 digits", "coco", "refused: .*not readable JSON", "9" * 5000),
    ("JSON with NaN for an id", "karpathy", "refused: .*1 of 1 records cannot be used .*row 0", '[{"image": "a.png", "caption": "x", "image_id": NaN}]'),
    ("JSON of the wrong kind", "karpathy", "refused: .*expected a list of rows, found dict", "{}"),
    ("JSON of the wrong kind for COCO", "coco", "refused: .*lists 'images' and 'annotations'", "[1]"),
    ("JSON with a byte order mark", "karpathy", "9 records, 0 skipped", "\ufeff" + json.dumps(ROWS)),
    ("Karpathy rows of the wrong type", "karpathy", r"9 records, 2 skipped \(row 0", json.dumps([5, None, *ROWS])),
    ("a caption that is a number", "karpathy", r"9 records, 1 skipped \(row 9", json.dumps([*ROWS, {"image": "b.png", "caption": 5}])),
    (
        "an image listed twice in a Karpathy file",
        "karpathy",
        "1 records, 0 skipped",
        json.dumps([{"image": "a.png", "caption": "red"}, {"image": "a.png", "caption": "blue", "image_id": 7}]),
    ),
    (
        "a Karpathy path outside the image folder",
        "karpathy",
        r"9 records, 1 skipped \(image ../x: .*is outside",
        json.dumps([*ROWS, {"image": "../x", "caption": "a"}]),
    ),
):  # fmt: skip
    FAULTS.append(Fault(_name, _expected, lambda f, form=_form, content=_content: opened(f, form, content)))


def coco_of(images: list, annotations: list) -> str:
    good = [{"id": n, "file_name": "a.png"} for n in range(100, 120)]
    annotated = [{"image_id": n, "caption": "red"} for n in range(100, 120)]
    return json.dumps({"images": good + images, "annotations": annotated + annotations})


@fault("two COCO images with the same id", r"20 records, 2 skipped \(image 21: its id 1")
def _(folder: Path) -> Any:
    images = [{"id": 1, "file_name": "b.png"}, {"id": 1, "file_name": "c.png"}]
    return opened(folder, "coco", coco_of(images, [{"image_id": 1, "caption": "b or c"}]))


@fault("a COCO path outside the image folder", r"20 records, 1 skipped \(image 1: '../../etc/passwd' is outside")
def _(folder: Path) -> Any:
    return opened(
        folder, "coco", coco_of([{"id": 1, "file_name": "../../etc/passwd"}], [{"image_id": 1, "caption": "b"}])
    )


@fault("COCO ids of the wrong type", "20 records, 3 skipped")
def _(folder: Path) -> Any:
    images = [{"id": [1], "file_name": "a.png"}, {"id": 1.5, "file_name": "a.png"}, {"id": 1, "file_name": None}]
    return opened(folder, "coco", coco_of(images, []))


# shards


def tar_of(*members: tuple[str, bytes], good: int = 9, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    every = [
        *members,
        *((f"{n:03}.{kind}", d) for n in range(good) for kind, d in (("png", encoded("PNG")), ("txt", b"red"))),
    ]
    with tarfile.open(fileobj=buffer, mode="w", **settings) as tar:
        for name, data in every:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sharded(folder: Path, content: bytes) -> str:
    (folder / "0.tar").write_bytes(content)
    before = {path.name for path in folder.parent.iterdir()}
    open_source.cache_clear()
    source = open_source(SourceSpec(format="webdataset", shards=str(folder / "0.tar")))
    bad = 0
    for index in range(len(source)):
        try:
            source.image(index), source.captions(index)
        except ClipressError:
            bad += 1
    assert {path.name for path in folder.parent.iterdir()} == before  # Nothing was unpacked.
    return f"{len(source)} records, {bad} unreadable"


def header_of(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """Return a tar header whose size field is any bytes."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124:136], block[148:156], block[156:157], block[257:265] = size, b" " * 8, kind, b"ustar\x0000"
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


for _name, _expected, _content in (
    ("a truncated tar", "accepted: [1-8] records", tar_of()[:9000]),
    ("a tar with members ../x and /etc/x", "accepted: 11 records, 0 unreadable",
     tar_of(("../x.png", encoded("PNG")), ("../x.txt", b"a"), ("/etc/x.png", encoded("PNG")), ("/etc/x.txt", b"a"))),
    ("a text file as a tar", "refused: .*is not a readable tar", b"hello"),
    ("a tar of zero bytes", "refused: .*is not a readable tar file: empty file", b""),
    ("a gzip file named .tar", "refused: .*is not a readable tar.*Compressed", b"\x1f\x8b\x08" + b"\0" * 600),
    ("a tar header of 8 EB", "accepted: 9 records", tar_of()[: 9 * 2048] + header_of("z.png", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7)),
    ("a tar header of a negative size (an endless loop)", "accepted: 9 records",
     tar_of().rstrip(b"\0").ljust(19 * 1024, b"\0")[: 9 * 2048] + header_of("z.png", b"\xff" * 10 + b"\xfe\x00") + b"\0" * 1024),
    ("a long name of 100 GB", "accepted: 9 records",
     tar_of()[: 9 * 2048] + header_of("././@LongLink", b"\x80" + b"\0" * 6 + (100 << 30).to_bytes(5, "big"), b"L") + b"\0" * 1024),
    ("a label too large for an integer", "accepted: 9 records, 0 unreadable", tar_of(("x.cls", b"9" * 30))),
    ("a broken image in a tar", "accepted: 10 records, 1 unreadable", tar_of(("x.png", b"no"), ("x.txt", b"a"))),
    ("a blank caption in a tar", "accepted: 10 records, 1 unreadable", tar_of(("x.png", encoded("PNG")), ("x.txt", b"  "))),
    ("the same name twice in a tar", "accepted: 11 records, 0 unreadable", tar_of(*[("x.png", encoded("PNG")), ("x.txt", b"a")] * 2)),
):  # fmt: skip
    FAULTS.append(Fault(_name, _expected, lambda folder, content=_content: sharded(folder, content)))


@fault("a pax record that makes a size negative", "accepted: 9 records")
def _(folder: Path) -> Any:
    body = b"16 size=-999999\n".ljust(512, b"\0")
    tail = header_of("p", b"00000000020\0", b"x") + body + header_of("z.png", b"00000000000\0") + b"\0" * 1024
    return sharded(folder, tar_of()[: 9 * 2048] + tail)


@fault("links and devices in a tar", "accepted: 9 records, 0 unreadable")
def _(folder: Path) -> Any:
    buffer = io.BytesIO(tar_of())
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("0.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return sharded(folder, buffer.getvalue())


@fault("a shard deleted during the epoch", "refused: .*0.tar cannot be read")
def _(folder: Path) -> Any:
    (folder / "0.tar").write_bytes(tar_of())
    open_source.cache_clear()
    source = open_source(SourceSpec(format="webdataset", shards=str(folder / "0.tar")))
    (folder / "0.tar").unlink()
    return source.image(0)


@fault("a shard truncated during the epoch", "refused: .*shorter than when it was indexed")
def _(folder: Path) -> Any:
    (folder / "0.tar").write_bytes(tar_of())
    open_source.cache_clear()
    source = open_source(SourceSpec(format="webdataset", shards=str(folder / "0.tar")))
    (folder / "0.tar").write_bytes(b"")
    return source.image(0)


@fault("a pattern of a trillion shards", "refused: .*expected at most 1,000,000, found more")
def _(folder: Path) -> Any:
    return shard_paths(str(folder / "{0..999999999999}.tar"))


# checkpoints


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (open, (str(self.marker), "w"))


def imported(folder: Path, content: bytes, name: str = "a.pth", form: str = "auto") -> str:
    """Import a checkpoint; whatever the outcome, none of its code has run and no file is left behind."""
    (folder / name).write_bytes(content)
    try:
        import_checkpoint(folder / name, form)
    finally:
        assert not (folder / "ran").exists()
        assert {path.name for path in folder.iterdir()} == {name}
    return "a model"


def torch_saved(state: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **settings)
    return buffer.getvalue()


def tensors_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


UNREADABLE = "refused: Checkpoint ./a.(pth|safetensors): the file cannot be read"
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
for _name, _expected, _content in (
    ("safetensors with a header of 8 EB", UNREADABLE, tensors_of({}, length=1 << 63)),
    ("safetensors with a missing header of 90 MB", UNREADABLE, tensors_of({}, length=90 << 20)),
    ("safetensors with a header that is not JSON", UNREADABLE, tensors_of(b"{nonsense")),
    ("safetensors with overlapping tensors", UNREADABLE, tensors_of({"a": F32, "b": F32}, b"\0" * 4)),
    ("safetensors of an unknown type", UNREADABLE, tensors_of({"a": {**F32, "dtype": "F31"}}, b"\0" * 4)),
    (
        "safetensors with an absurd shape",
        UNREADABLE,
        tensors_of({"a": {**F32, "shape": [1 << 40, 1 << 40]}}, b"\0" * 4),
    ),
    ("safetensors with negative offsets", UNREADABLE, tensors_of({"a": {**F32, "data_offsets": [-4, 0]}}, b"\0" * 4)),
    ("truncated safetensors", UNREADABLE, save({"a": torch.ones(100)})[:-50]),
    ("safetensors of zero bytes", UNREADABLE, b""),
    ("safetensors of an unrelated model", "refused: .*expected one of the formats", save({"a": torch.ones(2)})),
):
    FAULTS.append(Fault(_name, _expected, lambda f, content=_content: imported(f, content, "a.safetensors")))
for _name, _expected, _content in (
    ("a checkpoint of zero bytes", UNREADABLE, b""),
    ("a text file as a checkpoint", UNREADABLE, b"hello"),
    ("a truncated checkpoint", UNREADABLE, torch_saved({"a": torch.ones(99)})[:-200]),
    ("a checkpoint that is a list", "refused: .*expected named weights, found list", torch_saved([1])),
    ("a checkpoint of numbers", "refused: .*expected named tensors only", torch_saved({"a": 5})),
    (
        "a tensor of 1 TB backed by one number",
        "refused: .*(claim|holds fewer)",
        torch_saved({"logit_scale": torch.zeros(1).expand(1 << 19, 1 << 19)}),
    ),
    (
        "a tensor larger than its storage",
        "refused: .*holds fewer",
        torch_saved({"a": torch.zeros(1).expand(1 << 20)}),
    ),
):
    FAULTS.append(Fault(_name, _expected, lambda f, content=_content: imported(f, content)))
NOT_RUN = "refused: .*entry 'model' is .*, which was not run"


@fault("a bare pickle that would run code", "refused: .*it is no file of torch.save")
def _(folder: Path) -> Any:
    return imported(folder, pickle.dumps({"model": Payload(folder / "ran")}, 2))


@fault("a .pth that would run code", NOT_RUN)
def _(folder: Path) -> Any:
    return imported(folder, torch_saved({"model": Payload(folder / "ran")}))


@fault("an old .pth that would run code", "refused: .*expected named weights, found io.open without any")
def _(folder: Path) -> Any:
    return imported(folder, torch_saved(Payload(folder / "ran"), _use_new_zipfile_serialization=False))


@fault("an old tar checkpoint that would run code", "refused: ")
def _(folder: Path) -> Any:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Payload(folder / "ran"), 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return imported(folder, buffer.getvalue(), "a.tar")


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@fault("a zip bomb named .pt", "refused: .*claims 50,000,0.. bytes and is")
def _(folder: Path) -> Any:
    return imported(folder, zipped({"a/data.pkl": b"\x80\x02}.", "a/data/0": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED))


@fault("a .pt whose directory claims 4 GB", "refused: .*the file cannot be read")
def _(folder: Path) -> Any:
    content = bytearray(zipped({"a/data.pkl": b"\x80\x02}.", "a/version": b"3"}))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return imported(folder, bytes(content))


@fault("a zip with members outside its folder", "refused: ")
def _(folder: Path) -> Any:
    return imported(folder, zipped({"../ran": b"x", "/ran": b"x", "a/data.pkl": b"\x80\x02}."}))


@fault("a pickle that claims 8 EB of text", UNREADABLE)
def _(folder: Path) -> Any:
    return imported(folder, b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.")


def foreign(folder: Path, config: Any, weights: bytes | None = None) -> str:
    """Import a folder in open_clip's layout."""
    state = open_clip_state()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "open_clip_config.json").write_text(text)
    (folder / "open_clip_model.safetensors").write_bytes(save(state) if weights is None else weights)
    import_checkpoint(folder)
    return "a model"


def small(**changes: Any) -> dict[str, Any]:
    """Return a small architecture; `text__layers=5` changes text_cfg.layers."""
    tower = {"width": 64, "layers": 1}
    found = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 8, "patch_size": 4, "head_width": 64},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 64, "heads": 1},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        (found[f"{part}_cfg"] if name else found)[name or part] = value
    return found


def open_clip_state() -> dict[str, torch.Tensor]:
    import open_clip

    return open_clip.model.CLIP(**small()).state_dict()


for _name, _expected, _changes in (
    ("a valid open_clip folder", "accepted: a model", {}),
    ("a config of a billion layers", "refused: .*layers: expected at most 256, found 1e.09", {"vision__layers": 10**9}),
    ("a config of a million positions", "refused: .*context_length: expected at most", {"text__context_length": 10**6}),
    ("a config of an absurd width", "refused: .*width: expected at most", {"text__width": 10**12}),
    ("a config with zero heads", "refused: .*cannot build", {"text__heads": 0}),
    ("a config of negative layers", "refused: ", {"text__layers": -1}),
    ("a config with NaN", "refused: ", {"vision__mlp_ratio": float("nan")}),
    ("a config of the wrong types", "refused: ", {"text__layers": "many"}),
    (
        "a config with a text tower from the hub",
        "refused: .*whose config is not known",
        {"text__hf_model_name": "a/b"},
    ),
    ("a config that does not match the weights", "refused: .*needs it", {"text__layers": 2}),
    ("a config with unknown keys", "refused: .*cannot build", {"text__wings": 2}),
):
    FAULTS.append(Fault(_name, _expected, lambda f, c=_changes: foreign(f, {"model_cfg": small(**c)})))


@fault("a tokenizer that would run third-party code", "refused: .*trust_remote_code, which could run code")
def _(folder: Path) -> Any:
    changes = {"text__hf_tokenizer_name": "a/b", "text__tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": small(**changes)}))
    (folder / "open_clip_model.safetensors").write_bytes(save(open_clip_state()))
    return import_checkpoint(folder).tokenize()


@fault("an OpenAI file of 3,000 layers", "refused: .*layers: expected at most 256, found 3000")
def _(folder: Path) -> Any:
    state = open_clip_state() | {f"transformer.resblocks.{n}.x": torch.ones(1) for n in range(3_000)}
    return imported(folder, torch_saved(state), form="openai")


@fault("an OpenAI file of a million positions", "refused: .*context_length: expected at most 8,192, found 1e.06")
def _(folder: Path) -> Any:
    return imported(
        folder, torch_saved(open_clip_state() | {"positional_embedding": torch.zeros(1_000_000, 64)}), form="openai"
    )


# artifacts


def damaged(folder: Path, **changes: Any) -> Path:
    """Write a small artifact, then change its header; `shapes=None` removes the key."""
    lineage = ({"stage": "import", "hash": "0"},)
    home = save_artifact(artifact_from_model(new_model(small(), 0), lineage, {}), folder / "artifact")
    header = json.loads((home / "clipress.json").read_text())
    header = {key: value for key, value in {**header, **changes}.items() if value is not None or key == "sparsity"}
    (home / "clipress.json").write_text(json.dumps(header))
    return home


for _name, _expected, _changes in (
    ("a valid artifact", "accepted: Model", {}),
    ("an artifact whose architecture is a list", "refused: .*architecture: Input should be a valid dict", {"architecture": []}),
    ("an artifact whose lineage is a number", "refused: .*lineage: Input should be a valid list", {"lineage": 5}),
    ("an artifact whose lineage has no hashes", "refused: .*lineage.0.hash: Field required", {"lineage": [{"stage": "a"}]}),
    ("an artifact whose shapes are missing", "refused: .*lacks shapes", {"shapes": None}),
    ("an artifact whose shapes are text", "refused: .*shapes: Input should be", {"shapes": "none"}),
    ("an artifact whose blocks are not described", "refused: .*do not describe visual", {"shapes": {}}),
    ("an artifact with absurd pixels", "refused: .*preprocess, size: ", {"preprocess": {"size": 10**9}}),
    ("an artifact that divides by zero", "refused: .*preprocess, std", {"preprocess": {"size": 8, "std": [0, 1, 1]}}),
    ("an artifact of an absurd width", "refused: .*width: expected at most", {"architecture": small(text__width=10**10)}),
    ("an artifact of a billion layers", "refused: .*layers: expected at most", {"architecture": small(text__layers=10**9)}),
    ("an artifact of 200 layers it does not have", "refused: .*do not describe", {"architecture": small(text__layers=200)}),
    ("an artifact with a text tower from the hub", "refused: .*file alone", {"architecture": small(text__hf_model_name="a/b")}),
    ("an artifact with a tokenizer that would run code", "refused: .*which could run code",
     {"tokenizer": {"name": "a/b", "context_length": 77, "kwargs": {"trust_remote_code": True}}}),
    ("an artifact with a context length of a trillion", "refused: .*context_length of 2 to", {"tokenizer": {"name": "clip-bpe", "context_length": 10**12}}),
    ("an artifact with quantizers for missing modules", "refused: .*modules the model does not have", {"quantization": {"modules": ["../x"]}}),
    ("an artifact from a later clipress", "refused: .*schema_version 99", {"schema_version": 99}),
):  # fmt: skip
    FAULTS.append(Fault(_name, _expected, lambda f, c=_changes: type(model_from_artifact(damaged(f, **c))).__name__))


@fault("an artifact with absurd block shapes", "refused: .*do not fit")
def _(folder: Path) -> Any:
    home = damaged(folder)
    header = json.loads((home / "clipress.json").read_text())
    next(iter(header["shapes"].values())).update(heads=1 << 20, qk_dim=1 << 20)
    (home / "clipress.json").write_text(json.dumps(header))
    return model_from_artifact(home)


@fault("an artifact without weights", r"refused: .*no model\.safetensors")
def _(folder: Path) -> Any:
    home = damaged(folder)
    (home / "model.safetensors").unlink()
    return load_artifact(home)


@fault("an artifact with one changed weight", "refused: .*truncated or changed")
def _(folder: Path) -> Any:
    path = damaged(folder) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return load_artifact(path.parent)


@fault("an artifact with replaced weights and a matching hash", "refused: .*do not fit its own shapes")
def _(folder: Path) -> Any:
    home = damaged(folder)
    (home / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
    header = json.loads((home / "clipress.json").read_text())
    header["weights_sha256"] = sha256(home / "model.safetensors")
    (home / "clipress.json").write_text(json.dumps(header))
    return model_from_artifact(home)


@fault("an artifact folder that is a symlink", "accepted: Model")
def _(folder: Path) -> Any:
    home = damaged(folder)
    (folder / "link").symlink_to(home)
    return type(model_from_artifact(folder / "link")).__name__


@fault("a header of 70 MB", "refused: .*longer than 64,000,000 bytes")
def _(folder: Path) -> Any:
    home = damaged(folder)
    (home / "clipress.json").write_bytes(b'{"lineage": [' + b'{"stage": "a", "hash": "b"},' * 2_600_000)
    return read_header(home)


@fault("a header nested 900 deep", "refused: .*nests deeper than 64")
def _(folder: Path) -> Any:
    home = damaged(folder)
    (home / "clipress.json").write_text('{"schema_version": 1, "lineage": ' + "[" * 900 + "]" * 900 + "}")
    return read_header(home)


@fault("show on a damaged artifact", "refused: with exit code 2: Error: .*lineage: Input should be")
def _(folder: Path) -> Any:
    return cli("show", damaged(folder, lineage={}))


@fault("show on a file", "refused: with exit code 2: ")
def _(folder: Path) -> Any:
    (folder / "run").write_text("x")
    return cli("show", folder / "run")


# exports, engines, ONNX


def exported(folder: Path, **changes: Any) -> Path:
    for tower in ("image", "text"):
        (folder / f"{tower}.onnx").write_bytes(b"onnx")
    files = {
        tower: {"file": f"{tower}.onnx", "sha256": sha256(folder / f"{tower}.onnx")} for tower in ("image", "text")
    }
    described = {
        "schema_version": 1, "stage": "a", "precision": "fp32", "embed_dim": 8, "logit_scale": 1.0, "files": files,
        "preprocess": {"size": 8}, "tokenizer": {"name": "clip-bpe", "context_length": 8}, "lineage_hash": "b", **changes,
    }  # fmt: skip
    (folder / "export.json").write_text(json.dumps(described))
    return folder


for _name, _expected, _changes in (
    ("a valid export", "accepted: Exported", {}),
    ("an export with another hash", "refused: .*truncated or changed", {"files": {t: {"file": f"{t}.onnx", "sha256": "0"} for t in ("image", "text")}}),
    ("an export with files outside its folder", "refused: .*files.image.file", {"files": {t: {"file": "../../etc/passwd", "sha256": "0"} for t in ("image", "text")}}),
    ("an export without files", "refused: .*files", {"files": {}}),
    ("an export of absurd pixels", "refused: .*preprocess.size", {"preprocess": {"size": 10**9}}),
    ("an export whose scale is not a number", "refused: .*logit_scale", {"logit_scale": float("nan")}),
):  # fmt: skip
    FAULTS.append(Fault(_name, _expected, lambda f, c=_changes: type(read_export(exported(f, **c))).__name__))


@fault("a folder that is not an export", "refused: .*no export.json")
def _(folder: Path) -> Any:
    return read_export(folder)


def graph(folder: Path, tensor: Any, name: str = "a.onnx") -> Path:
    """Write y = x + tensor, unchecked."""
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", 2]) for end in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor]))
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


def weights(**changes: Any) -> Any:
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "w")
    for key, value in changes.items():
        if key == "location":
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=value)
        elif key == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        else:
            setattr(tensor, key, value)
    return tensor


def engine(path: Path, *options: str) -> str:
    return cli("export", path, "--tensorrt", *options)


@fault("a text file as an ONNX file", "refused: with exit code 2: .*is not a readable ONNX file")
def _(folder: Path) -> Any:
    (folder / "a.onnx").write_text("hello, this is no graph")
    return engine(folder / "a.onnx")


@fault("a truncated ONNX file", "refused: with exit code 2: ")
def _(folder: Path) -> Any:
    path = graph(folder, weights())
    path.write_bytes(path.read_bytes()[:-30])
    return engine(path, "--foreign")


@fault("an ONNX file that clipress did not make", "refused: with exit code 2: .*was not made by clipress")
def _(folder: Path) -> Any:
    return engine(graph(folder, weights()))


for _location in ("../../../../../../etc/passwd", "/etc/passwd"):

    @fault(f"ONNX weights stored in {_location}", "refused: with exit code 2: .*is not a readable ONNX file")
    def _(folder: Path, location: str = _location) -> Any:
        return engine(graph(folder, weights(location=location)), "--foreign")

    @fault(f"ONNX weights stored in {_location}, opened by ONNX Runtime", "refused: .*cannot be opened by ONNX Runtime")
    def _(folder: Path, location: str = _location) -> Any:
        return open_session(graph(folder, weights(location=location)))


@fault("ONNX weights behind a symlink", "refused: with exit code 2: .*is not a readable ONNX file")
def _(folder: Path) -> Any:
    (folder / "w.bin").symlink_to("/etc/passwd")
    return engine(graph(folder, weights(location="w.bin")), "--foreign")


@fault("ONNX weights of an exabyte", "refused: with exit code 2: ")
def _(folder: Path) -> Any:
    return engine(graph(folder, weights(dims=[1 << 30, 1 << 30])), "--foreign")


@fault("ONNX weights of a negative size", "refused: with exit code 2: ")
def _(folder: Path) -> Any:
    return engine(graph(folder, weights(dims=[-5])), "--foreign")


@fault("ONNX weights of an unknown type", "refused: with exit code 2: ")
def _(folder: Path) -> Any:
    return engine(graph(folder, weights(data_type=99)), "--foreign")


@fault("ONNX weights of an exabyte, opened by ONNX Runtime", "refused: .*cannot be opened by ONNX Runtime")
def _(folder: Path) -> Any:
    return open_session(graph(folder, weights(dims=[1 << 30, 1 << 30])))


@fault("an engine without a sidecar", "refused: .*is not loaded without one")
def _(folder: Path) -> Any:
    (folder / "a.engine").write_bytes(b"plan")
    return load_engine(folder / "a.engine")


def sidecar(folder: Path, **changes: Any) -> Path:
    (folder / "a.engine").write_bytes(b"plan")
    described = {
        "schema_version": 1, "tower": "image", "precision": "fp16", "tensorrt": "10.16", "gpu": "g", "clipress": "1",
        "compute_capability": [9, 0], "version_compatible": False, "hardware_compatibility": "none", "onnx_sha256": "0",
        "plan_sha256": sha256(folder / "a.engine"), "settings": {}, **changes,
        "profile": {key: [1, 3] for key in ("min", "opt", "max")},
    }  # fmt: skip
    (folder / "a.engine.json").write_text(json.dumps(described))
    return folder / "a.engine"


@fault("an engine with the sidecar of another one", "refused: .*truncated or changed.*not loaded")
def _(folder: Path) -> Any:
    return load_engine(sidecar(folder, plan_sha256="0" * 64))


@fault("an engine with a sidecar of the wrong types", "refused: .*compute_capability.*not loaded")
def _(folder: Path) -> Any:
    return load_engine(sidecar(folder, compute_capability="nine"))


# recipes


def recipe(folder: Path, content: str | bytes) -> str:
    path = folder / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        return cli("run", path, "--out", folder / "run")
    finally:
        assert not (folder / "run").exists() and not (folder / "ran").exists()


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


def changed(**changes: Any) -> str:
    return yaml.safe_dump({**RECIPE, **changes})


for _name, _expected, _content in (
    ("a billion laughs", "has more than 100,000 values", LAUGHS + "name: x\ndata: *j\n"),
    ("a billion laughs by merge keys", "has more than 100,000 values", MERGES + "name: x\ndata: *j\n"),
    ("a recipe that contains itself", "has more than", "name: x\ndata: &a [*a]\n"),
    ("a recipe with !!python/object", "is not valid YAML: could not determine a constructor", "name: !!python/object/apply:os.system ['touch ran']\n"),
    ("a recipe of 100 MB", "expected at most 1,000,000 bytes", b"x" * 100_000_000),
    ("a recipe nested 10,000 deep", "nests deeper than 64", "a: " + "[" * 10_000),
    ("a recipe nested 100 deep", "nests deeper than", "a: " + "[" * 100 + "]" * 100),
    ("a recipe that is a list", "expected a mapping with named sections, found list", "- a\n- b\n"),
    ("a recipe that is a string", "found str", "hello"),
    ("a recipe of zero bytes", "found NoneType", b""),
    ("a recipe of several documents", "expected a single document", "a: 1\n---\nb: 2\n"),
    ("a recipe that is not UTF-8", "cannot be read", b"name: caf\xe9\n"),
    ("a recipe of random bytes", "cannot be read", bytes(range(256))),
    ("a recipe with a byte order mark", "name: this key is required", "\ufeffdata: {}\n".encode()),
    ("a recipe with an invalid date", "is not valid YAML", "name: 2001-99-99\n"),
    ("a recipe with !!bool maybe", "is not valid YAML", "name: !!bool maybe\n"),
    ("a recipe with !!timestamp now", "is not valid YAML", "name: !!timestamp now\n"),
    ("a recipe with a number of 5,000 digits", "is not valid YAML", "name: " + "9" * 5000 + "\n"),
    ("a recipe with a lone surrogate", "is not valid YAML", 'name: "\\ud800"\n'),
    ("a recipe with an unknown key", "unknown key 'stagse'. Did you mean 'stages'", changed(stagse=[])),
    ("a recipe with a key of a million letters", "unknown key 'xxx", changed(**{"x" * 900_000: 1})),
    ("a recipe with 10,000 unknown keys", "and 9980 more", changed(**{f"x{n}": 1 for n in range(10_000)})),
    ("a recipe with NaN for a rate", "lr: Input should be a finite number", changed(stages=[{"distill": {"lr": float("nan"), "steps": 1}}])),
    ("a recipe with an infinite weight", "weight: Input should be a finite number", changed(data={"train": [{"format": "digits", "weight": float("inf")}]})),
    ("a recipe with a negative seed", "seed: Input should be greater than or equal to 0", changed(seed=-1)),
    ("a recipe with a negative limit", "limit: Input should be greater", changed(data={"train": [{"format": "digits", "limit": -5}]})),
    ("a recipe whose name is a path", "name: .*expected a folder name", changed(name="../../x")),
    ("a recipe with a stage whose name is a path", "names a folder", changed(stages=[{"distill": {"name": "../x", "steps": 1}}])),
    ("a recipe with a teacher recipe whose name is a path", "name: .*expected a folder name", changed(teacher={"recipe": {"name": "../x", "data": {}}})),
    ("a recipe whose data section is a string", "data: Input should be a valid dictionary", changed(data="all")),
    ("a recipe whose stages are a mapping", "stages: Input should be a valid list", changed(stages={"prune": {}})),
    ("an empty separator", "separator: String should have at least 1", changed(data={"train": [{"format": "csv", "separator": ""}]})),
):  # fmt: skip
    FAULTS.append(Fault(_name, f"refused: with exit code 2: .*({_expected})", lambda f, c=_content: recipe(f, c)))


@fault("a folder as a recipe", "refused: with exit code 2: .*cannot be read")
def _(folder: Path) -> Any:
    return cli("run", folder, "--out", folder / "run")


@fault("an endless device as a recipe", "refused: .*expected at most 1,000,000 bytes")
def _(folder: Path) -> Any:
    return read_recipe("/dev/zero")


@fault("an override nested 5,000 deep", "refused: with exit code 2: .*not valid YAML")
def _(folder: Path) -> Any:
    (folder / "r.yaml").write_text(changed())
    return cli("run", folder / "r.yaml", "--out", folder / "run", "--set", f"bench={'[' * 5000}")


@fault("a run folder that is a file", "refused: with exit code 2: ")
def _(folder: Path) -> Any:
    (folder / "r.yaml").write_text(changed())
    (folder / "run").write_text("a note")
    return cli("compress", folder / "r.yaml", "--out", folder / "run")


# teacher embeddings


def cache(folder: Path, **changes: Any) -> Path:
    """Write a cache of three items in two shards."""
    manifest = Manifest(
        teacher="t", logit_scale=1.0, preprocess=Preprocess(size=8), tokenizer={}, source="s", fingerprint="f", items=3,
        augment={}, views=1, dim=4, dtype="fp16", precision="fp32", items_per_shard=2, made_with={},
    )  # fmt: skip
    home = write_manifest(folder, manifest)
    for number in range(2):
        count = len(manifest.items_of(number))
        rows = Rows(np.ones((count, 4), np.float32), np.ones((count, 4), np.float32), np.arange(count),
                    np.arange(count + 1), np.zeros((count, 7), np.int32), np.ones(count, bool),
                    np.zeros((count, 2), np.int64))  # fmt: skip
        write_shard(home, number, manifest, rows)
    if changes:
        found = json.loads((home / "manifest.json").read_text()) | changes
        (home / "manifest.json").write_text(json.dumps(found))
    return home


@fault("valid teacher embeddings", "accepted: 3 items")
def _(folder: Path) -> Any:
    return f"{len(TeacherCache.open(cache(folder), verify=True))} items"


@fault("teacher embeddings with a truncated shard", "refused: .*shard 00001: image.npy: expected .* bytes")
def _(folder: Path) -> Any:
    home = cache(folder)
    path = home / "00001" / "image.npy"
    path.write_bytes(path.read_bytes()[:-3])
    return TeacherCache.open(home)


@fault("teacher embeddings with a changed manifest", "refused: .*one of them was changed")
def _(folder: Path) -> Any:
    return TeacherCache.open(cache(folder, fingerprint="another"))


@fault("teacher embeddings of 2^40 items, one a shard", "refused: .*expected at most .* shards")
def _(folder: Path) -> Any:
    return TeacherCache.open(cache(folder, items=1 << 40, items_per_shard=1))


@fault("teacher embeddings with zero items per shard", "refused: .*items_per_shard: ")
def _(folder: Path) -> Any:
    return TeacherCache.open(cache(folder, items_per_shard=0))


def with_array(folder: Path, name: str, array: np.ndarray | bytes) -> Path:
    """Put another array into the first shard, and record it in shard.json."""
    home = cache(folder)
    path, described = home / "00000" / f"{name}.npy", home / "00000" / "shard.json"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array, allow_pickle=True)
    shard = json.loads(described.read_text())
    shard["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    described.write_text(json.dumps(shard))
    return home


for _name, _expected, _array, _content in (
    ("teacher embeddings stored as a pickle", "refused: .*unreadable ok.npy", "ok", np.asarray([{}, {}], object)),
    ("teacher embeddings of zero bytes", "refused: .*unreadable views.npy", "views", b""),
    (
        "teacher embeddings of NaN",
        "refused: .*expected norm 1 in row 0, found nan",
        "image",
        np.full((2, 4), np.nan, np.float16),
    ),
    (
        "caption indices out of range",
        "refused: .*captions.npy: expected indices of 2 texts",
        "captions",
        np.asarray([0, 9]),
    ),
    (
        "descending caption offsets",
        "refused: .*offsets.npy: expected ascending offsets of 2 captions",
        "offsets",
        np.asarray([0, 5, 2]),
    ),
    ("views of the wrong shape", "refused: .*views.npy: expected int32", "views", np.zeros((2, 6), np.int32)),
):
    FAULTS.append(
        Fault(_name, _expected, lambda f, n=_array, c=_content: TeacherCache.open(with_array(f, n, c), verify=True))
    )


# studies, results, labels


def study(folder: Path, **changes: Any) -> Path:
    (folder / "r.yaml").write_text(changed())
    found = {"name": "s", "recipe": "r.yaml", "methods": {"a": [{"prune": {}}]}, "reference": "a", "seeds": [0]}
    (folder / "s.yaml").write_text(yaml.safe_dump({**found, **changes}))
    return folder / "s.yaml"


for _name, _expected, _changes in (
    ("a study whose name is a path", "refused: study.name: .*expected a folder name", {"name": "../x"}),
    ("a study with a method whose name is a path", "refused: study.methods.* expected a folder name", {"methods": {"../x": []}}),
    ("a study without seeds", "refused: study.seeds", {"seeds": []}),
    ("a study with ratios and nothing to prune", "refused: .*begin with a prune stage", {"ratios": {"2x": 0.5}, "methods": {"a": []}}),
    ("a study whose methods are a list", "refused: study.methods: ", {"methods": [1]}),
):  # fmt: skip
    FAULTS.append(Fault(_name, _expected, lambda f, c=_changes: read_study(study(f, **c))))


@fault("a billion laughs in a study", "refused: Study .*has more than")
def _(folder: Path) -> Any:
    (folder / "s.yaml").write_text(LAUGHS)
    return read_study(folder / "s.yaml")


for _name, _content in (
    ("truncated results", '{"rows": ['),
    ("results without rows", '{"rows": [], "conditions": {}}'),
    ("results of the wrong types", '{"rows": 5}'),
    ("results of zeros", json.dumps({"rows": [{"accuracy": {}, "macs": 0, "lineage": [], "latency": [{"batch": 1, "median_ms": 0}]}] * 2})),
):  # fmt: skip

    @fault(_name, "refused: .*holds no readable results")
    def _(folder: Path, content: str = _content) -> Any:
        from clipress.studies.methods import row_of
        from clipress.studies.study import Case

        (folder / "bench").mkdir()
        (folder / "bench" / "results.json").write_text(content)
        return row_of(Case(method="a", ratio=None, seed=0, recipe={}), folder)


for _name, _expected, _content in (
    ("a file that is not a cost table", "refused: .*is not a cost table", "[]"),
    ("a cost table nested 100,000 deep", "refused: .*is not a cost table .it nests deeper", DEEP),
    ("a cost table without figures", "refused: .*the table has none", '{"schema_version": 1, "towers": []}'),
    (
        "a cost table with rows of different lengths",
        "refused: .*the table has none",
        json.dumps({"schema_version": 1, "towers": {"image": {"ffn": {"levels": [1, 256], "ms": [1]}}}}),
    ),
):

    @fault(_name, _expected)
    def _(folder: Path, content: str = _content) -> Any:
        from clipress.compress.prune.costs import latency_curve, read_costs
        from clipress.models import anatomy

        (folder / "costs.json").write_text(content)
        part = next(iter(anatomy.ffns(new_model(small(), 0).module)))
        return latency_curve(SimpleNamespace(part=part, kind="ffn", units=256), read_costs(folder / "costs.json"))


@fault("an empty label file", "refused: with exit code 2: .*expected one entry per line, found none")
def _(folder: Path) -> Any:
    (folder / "labels.txt").write_text("\n \n")
    return cli("data", "prompts", folder / "labels.txt", "--out", folder / "out.txt")


@fault("an image as a label file", "refused: with exit code 2: .*cannot be read")
def _(folder: Path) -> Any:
    (folder / "labels.txt").write_bytes(encoded("PNG"))
    return cli("data", "prompts", folder / "labels.txt", "--out", folder / "out.txt")


@fault("a label file of 200,000 names", "accepted: 200000 names")
def _(folder: Path) -> Any:
    (folder / "labels.txt").write_text("\n".join(f"name {n}" for n in range(200_000)))
    names = read_classes(folder / "labels.txt").names
    check_labels(names)
    return f"{len(names)} names"


@fault("duplicate labels", "refused: .*repeated ones: a")
def _(folder: Path) -> Any:
    return check_labels(["a", "b", "a"])


@fault("prompts nested 100,000 deep", "refused: .*nests deeper")
def _(folder: Path) -> Any:
    (folder / "p.json").write_text(DEEP)
    return read_prompts(folder / "p.json")


@fault("a very thin image opened by the caller", "accepted: (8, 8, 3)".replace("(", r"\(").replace(")", r"\)"))
def _(folder: Path) -> Any:
    return fitted(Image.new("RGB", (90, 1)), Preprocess(size=8)).shape


def rows() -> list[dict[str, Any]]:
    """Run the whole table: for every input, what was expected and what happened."""
    found = []
    for one in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            happened = one.happened(Path(folder)).replace(folder, ".")
        passed = bool(re.search(one.expected, happened, re.DOTALL))
        expected = one.expected if len(one.expected) < 200 else f"{one.expected[:200]}..."
        found.append({"input": one.name, "expected": expected, "happened": happened.strip()[:300], "passed": passed})
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(rows(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
