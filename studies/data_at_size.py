"""What do millions of records cost? `python studies/data_at_size.py [CASE ...]`: start-up of sources, near-duplicates, an index.

Everything is made up and lies in a temporary folder, of up to 10 GB. Each case runs in a process of its own: seconds by the clock and
on the CPU, and the memory that it takes beyond its imports and inputs, at its peak; files that are mapped count as far as they were
read. Vectors are of 20,000 clusters, since embeddings are not spread evenly. Writes data_at_size.json and data_at_size.md beside
this file; cases that were not given keep their rows.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from clipress.data import filter as data_filter
from clipress.data.cache_files import Manifest, Rows, shard_folder, write_manifest, write_shard
from clipress.data.filter import nearest_to_prompts
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.data.teacher_cache import TeacherCache
from clipress.data.transforms import Augment, Preprocess, View, drawn_view, open_image, viewed
from clipress.runtime.cpu import processor
from clipress.serve.index import Encoder, Index, Kind, open_index, write_index

HERE = Path(__file__).parent
COMMAND = "python studies/data_at_size.py"
ROWS, SHARDS, IN_SHARD, COCO = 12_000_000, 1000, 100, 113_287
VECTORS, DIM, CLUSTERS, QUERIES, ALIKE = 1_000_000, 512, 20_000, 1000, 200_000
CACHED, CACHED_DIM = 3_000_000, 768
BLOCK, PART, PHOTOS = 50_000, 4096, 400
CASES: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], dict[str, Any]]]] = {}
"""Name: what it is, what it needs made, and what is measured."""


def case(name: str, what: str, make: Callable[[Path], None] = lambda _: None) -> Callable:
    """Register a function as a case. It returns more figures."""

    def add(measure: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
        CASES[name] = (what, make, measure)
        return measure

    return add


def _table(home: Path) -> None:
    rng = np.random.default_rng(0)
    words = (
        "a the of photo dog cat man woman red blue sitting standing near street with house in snow beach old".split()
    )
    captions = [" ".join(rng.choice(words, 11)) for _ in range(100_000)]
    with (home / "pairs.tsv").open("w") as file:
        file.write("title\tfilepath\n")
        for number in range(ROWS):
            file.write(f"{captions[number * 7919 % len(captions)]}\ttrain/{number // 10_000:05d}/{number:09d}.jpg\n")


@case("table", f"table of {ROWS:,} pairs (TSV, 1 GB)", _table)
def open_table(home: Path) -> dict[str, Any]:
    """Open a table, whose first 50,000 images are not there to be checked."""
    from clipress.data.formats import files

    files.FILES_CHECKED = 0
    spec = SourceSpec(format="csv", annotations=home / "pairs.tsv")
    with measured() as figures:
        source = FORMATS["csv"](spec)
    with measured() as again:
        FORMATS["csv"](spec)
    return {**figures, "records": len(source), "again_s": again["wall_s"], "again_mb": again["memory_mb"]}


def _shards(home: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    for shard in range(SHARDS):
        with tarfile.open(home / f"{shard:05d}.tar", "w") as tar:
            for number in range(IN_SHARD):
                for ending, content in (("jpg", file.getvalue()), ("txt", b"a photo of a cat")):
                    entry = tarfile.TarInfo(f"{shard:05d}{number:04d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


@case("shards", f"{SHARDS:,} tar shards of {IN_SHARD} records, indexed for the first time", _shards)
def open_shards(home: Path) -> dict[str, Any]:
    """Index shards, then open them again."""
    spec = SourceSpec(format="webdataset", shards=f"{home}/{{00000..{SHARDS - 1:05d}}}.tar")
    with measured() as figures:
        source = FORMATS["webdataset"](spec)
    with measured() as again:
        FORMATS["webdataset"](spec)
    return {**figures, "records": len(source), "again_s": again["wall_s"]}


def _coco(home: Path) -> None:
    rows = [
        {
            "image": f"train2014/COCO_train2014_{number:012d}.jpg",
            "caption": f"caption {k} of image {number}",
            "image_id": f"coco_{number}",
        }
        for number in range(COCO)
        for k in range(5)
    ]
    (home / "coco.json").write_text(json.dumps(rows))


@case("karpathy", f"Karpathy's COCO: {COCO:,} images with 5 captions each", _coco)
def open_coco(home: Path) -> dict[str, Any]:
    """Open a Karpathy JSON of COCO's size."""
    from clipress.data.formats import files

    files.FILES_CHECKED = 0
    with measured() as figures:
        source = FORMATS["karpathy"](SourceSpec(format="karpathy", annotations=home / "coco.json"))
    return {**figures, "records": len(source)}


def _cache(home: Path) -> None:
    about = {"preprocess": Preprocess(size=224), "tokenizer": {}, "augment": Augment(), "views": 1, "dtype": "fp16"}
    about |= {"precision": "fp32", "fingerprint": "x", "made_with": {}}
    manifest = Manifest(teacher="x", source="x", items=CACHED, dim=CACHED_DIM, **about)
    folder, rng = write_manifest(home, manifest), np.random.default_rng(0)
    for shard in range(manifest.shards):
        size = len(manifest.items_of(shard))
        if 0 < shard < manifest.shards - 1:
            shutil.copytree(shard_folder(folder, 0), shard_folder(folder, shard))
            continue
        raw = (rng.standard_normal((size, CACHED_DIM), np.float32) for _ in range(2))
        views, states = np.zeros((size, 7), np.int32), np.zeros((size, 2), np.int64)
        rows = Rows(*raw, np.arange(size), np.arange(size + 1), views, np.ones(size, bool), states)
        write_shard(folder, shard, manifest, rows)


@case("teacher-cache", f"teacher cache of {CACHED:,} images and texts of {CACHED_DIM}, float16", _cache)
def open_cache(home: Path) -> dict[str, Any]:
    """Open a cache, and look up batches of 1,024 images and texts."""
    folder = next(path for path in home.iterdir() if path.is_dir())
    with measured() as figures:
        cache = TeacherCache.open(folder)
    rng, start = np.random.default_rng(0), time.perf_counter()
    for _ in range(20):
        rows = rng.integers(len(cache), size=1024)
        cache.images(rows), cache.texts(rows)
    return {**figures, "records": len(cache), "batch_ms": round(1000 * (time.perf_counter() - start) / 20, 1)}


def _vectors(count: int) -> Iterator[np.ndarray]:
    """Yield unit vectors float32 [<=BLOCK, DIM] around the centres, the same ones every time."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, DIM), np.float32)
    rng = np.random.default_rng(1)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        rows = centres[rng.integers(0, CLUSTERS, size)] + rng.standard_normal((size, DIM), np.float32)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


@case("near-duplicates", f"`data filter --near-duplicates 0.95` of {ALIKE:,} vectors of {DIM}")
def filter_near(_: Path) -> dict[str, Any]:
    """Choose all images that are near to no better one, exactly and by faiss."""
    images = np.concatenate(list(_vectors(ALIKE)))
    copies, rng = images[ALIKE // 2 :], np.random.default_rng(2)
    copies[:] = images[: ALIKE // 2] + rng.uniform(0, 0.5, (len(copies), 1)).astype(np.float32) * copies
    copies /= np.linalg.norm(copies, axis=1, keepdims=True)
    return _filtered(images)


@case("no-duplicates", f"the same of {ALIKE:,} vectors that are all kept")
def filter_distinct(_: Path) -> dict[str, Any]:
    """Choose all images where none is near to another."""
    return _filtered(np.concatenate(list(_vectors(ALIKE))))


def _filtered(images: np.ndarray) -> dict[str, Any]:
    prompts = next(_vectors(100))
    found = []
    for data_filter.EXACT_UP_TO in (ALIKE, 0):  # exactly, and by faiss
        with measured() as figures:
            found.append({one.index for one in nearest_to_prompts(images, prompts, ALIKE, 0.95)})
        found.append(figures)
    exact, figures, by_faiss, faiss_figures = found
    more = {"kept": len(exact), "by_faiss_s": faiss_figures["wall_s"], "by_faiss_cpu_s": faiss_figures["cpu_s"]}
    return {**figures, "records": ALIKE, **more, "faiss_differs": len(by_faiss ^ exact)}


def _vector_file(home: Path) -> None:
    with (home / "vectors").open("wb") as file:
        for block in _vectors(VECTORS + QUERIES):
            file.write(np.ascontiguousarray(block))


def _read(home: Path, start: int = 0, stop: int = VECTORS) -> Iterator[np.ndarray]:
    for at in range(start, stop, PART):
        count = min(PART, stop - at)
        yield np.fromfile(home / "vectors", np.float32, count * DIM, offset=at * DIM * 4).reshape(count, DIM)


@case("index", f"index of {VECTORS:,} vectors of {DIM}, inverted lists", _vector_file)
def build_index(home: Path) -> dict[str, Any]:
    """Build an index; compare it with an exact one."""
    (figures, lists), (exact_figures, exact) = (_built(home, kind) for kind in ("ivf", "flat"))
    (queries,) = _read(home, VECTORS, VECTORS + QUERIES)
    pairs = zip(lists.search(queries, 10)[1], exact.search(queries, 10)[1], strict=True)
    recall = np.mean([len(set(found) & set(wanted)) / 10 for found, wanted in pairs])
    more = {"recall_at_10": round(float(recall), 3), "query_ms": _query_ms(lists, queries[:200])}
    more |= {"exact_query_ms": _query_ms(exact, queries[:20])}
    more |= {"exact_build_s": exact_figures["wall_s"], "exact_build_mb": exact_figures["memory_mb"]}
    return {**figures, "records": VECTORS, **more}


def _built(home: Path, kind: Kind) -> tuple[dict[str, Any], Index]:
    encoder = Encoder(lineage="x", stage="x", precision="fp32", sha256="0" * 64)
    keys = [f"{number:09d}.jpg" for number in range(VECTORS)]
    with measured() as figures:
        write_index(home / kind, kind, lambda: _read(home), keys, encoder)
    return figures, open_index(home / kind)


def _query_ms(index: Index, queries: np.ndarray) -> float:
    times = []
    for query in queries:
        start = time.perf_counter()
        index.search(query[None], 10)
        times.append(1000 * (time.perf_counter() - start))
    return round(float(np.median(times)), 1)


def _photos(home: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        blurred = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grainy = np.asarray(blurred, np.float32) + rng.normal(0, 6, (480, 640, 3))
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(home / f"{number}.jpg", quality=90)


@case("decoding", f"{PHOTOS} JPEGs of 640 x 480 decoded, cropped and resized to 224, one core", _photos)
def decode(home: Path) -> dict[str, Any]:
    """Read images as training does, with both libraries."""
    import torch

    torch.set_num_threads(1)
    augment, preprocess = Augment(crop_scale=(0.4, 1.0), flip=True), Preprocess(size=224)
    files, per_second = sorted(home.glob("*.jpg")), {}
    for library in ("pillow", "torch"):
        viewed(open_image(files[0]), preprocess, View(), library)  # imports
        with measured() as figures:
            began = time.process_time()
            for number, file in enumerate(files):
                image = open_image(file)
                viewed(image, preprocess, drawn_view(image.size, augment, np.random.default_rng(number)), library)
            per_second[f"{library}_per_core_s"] = round(len(files) / (time.process_time() - began))
    return {**figures, "records": len(files), **per_second}


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Measure a block: seconds by the clock and on the CPU, and the peak of memory above what there was. Linux only."""
    figures: dict[str, Any] = {}
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, wall, cpu = _status_mb("VmRSS"), time.perf_counter(), time.process_time()
    yield figures
    figures |= {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    figures["memory_mb"] = round(_status_mb("VmHWM") - before)


def _status_mb(name: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1024


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Data at size",
        "",
        f"`{COMMAND}`, two cores. Memory at its peak, beyond imports and inputs. `load`: how many others wanted the cores, which",
        "lengthens seconds by the clock, and CPU seconds too; earlier rows do not tell it. `threads`: OMP_NUM_THREADS.",
        "",
        "| | records | seconds | CPU seconds | memory (MB) | more | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    known = {"case", "what", "records", "wall_s", "cpu_s", "memory_mb", "date", "processor"}
    for row in rows:
        more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
        lines.append(
            f"| {row['what']} | {row['records']:,} | {row['wall_s']} | {row['cpu_s']} | {row['memory_mb']} | {more} | "
            f"{row['date']}, {row['processor']} |"
        )
    return "\n".join(lines) + "\n"


def main(*names: str) -> None:
    """Make, measure and write the cases, by default all."""
    target = HERE / "data_at_size.json"
    rows = {row["case"]: row for row in json.loads(target.read_text())["rows"]} if target.is_file() else {}
    for name in names or CASES:
        with TemporaryDirectory() as folder:
            CASES[name][1](Path(folder))
            run = [sys.executable, __file__, "--measure", name, folder]
            alone = {**os.environ, "CLIPRESS_CACHE": str(Path(folder) / ".cache")}
            load = round(os.getloadavg()[0], 1)
            done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True, env=alone)
            where = {
                "threads": os.environ.get("OMP_NUM_THREADS", "all"),
                "load": load,
                "date": date.today().isoformat(),
                "processor": str(processor()),
            }
            rows[name] = {"case": name, "what": CASES[name][0], **json.loads(done.stdout.splitlines()[-1]), **where}
            sys.stderr.write(f"{rows[name]}\n")
    ordered = [rows[name] for name in CASES if name in rows]
    target.write_text(json.dumps({"command": COMMAND, "rows": ordered}) + "\n", encoding="utf-8")
    (HERE / "data_at_size.md").write_text(markdown(ordered), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(CASES[sys.argv[2]][2](Path(sys.argv[3]))))  # noqa: T201
    else:
        main(*sys.argv[1:])
