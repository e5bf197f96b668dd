"""What do millions of records cost? `python studies/data_at_size.py [CASE ...]`: start-up of sources, near-duplicates, an index.

Everything is made up and lies in a temporary folder. Each case runs in a process of its own: seconds by the clock and on the CPU,
and the memory that it takes beyond its imports, at its peak. Vectors are of 20,000 clusters, since embeddings are not spread
evenly. Writes data_at_size.json and data_at_size.md beside this file; cases that were not asked for keep their rows.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from clipress.data.filter import nearest_to_prompts
from clipress.data.sources import FORMATS
from clipress.data.spec import SourceSpec
from clipress.runtime.cpu import processor
from clipress.serve.index import Encoder, open_index, write_index

HERE = Path(__file__).parent
ROWS, SHARDS, IN_SHARD, COCO = 12_000_000, 1000, 100, 113_287
VECTORS, DIM, CLUSTERS, QUERIES, ALIKE = 1_000_000, 512, 20_000, 1000, 200_000
BLOCK = 50_000
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
    source = FORMATS["csv"](SourceSpec(format="csv", annotations=home / "pairs.tsv"))
    return {"records": len(source), "first": source.captions(len(source) - 1)[0]}


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
    records = len(FORMATS["webdataset"](spec))
    start = time.perf_counter()
    FORMATS["webdataset"](spec)
    return {"records": records, "again_s": round(time.perf_counter() - start, 2)}


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
    return {"records": len(FORMATS["karpathy"](SourceSpec(format="karpathy", annotations=home / "coco.json")))}


def _vectors(count: int) -> Iterator[np.ndarray]:
    """Yield unit vectors float32 [<=BLOCK, DIM] around the centres, the same ones every time."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, DIM), np.float32)
    rng = np.random.default_rng(1)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        rows = centres[rng.integers(0, CLUSTERS, size)] + rng.standard_normal((size, DIM), np.float32)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


@case("near-duplicates", f"`data filter --near-duplicates 0.9` of {ALIKE:,} vectors of {DIM}")
def filter_near(_: Path) -> dict[str, Any]:
    """Choose all images that are near to no better one."""
    images = np.concatenate(list(_vectors(ALIKE)))
    images[ALIKE // 2 :] = images[: ALIKE - ALIKE // 2]
    prompts = next(_vectors(100))
    start = time.perf_counter()
    kept = nearest_to_prompts(images, prompts, ALIKE, 0.9)
    return {"records": len(kept), "filter_s": round(time.perf_counter() - start, 1)}


@case("index", f"index of {VECTORS:,} vectors of {DIM}, inverted lists, then compared with exact search")
def build_index(home: Path) -> dict[str, Any]:
    """Build an index; compare it with an exact search."""
    encoder = Encoder(lineage="x", stage="x", precision="fp32", sha256="0" * 64)
    before, start = peak_mb(), time.perf_counter()
    write_index(home / "index", "ivf", lambda: _vectors(VECTORS), [f"{n:09d}.jpg" for n in range(VECTORS)], encoder)
    built, built_mb, index = time.perf_counter() - start, peak_mb() - before, open_index(home / "index")
    queries = next(_vectors(BLOCK))[:QUERIES]
    index.search(queries[:10], 10)
    times = []
    for query in queries[:200]:
        start = time.perf_counter()
        index.search(query[None], 10)
        times.append(1000 * (time.perf_counter() - start))
    _, found = index.search(queries, 10)
    best = [(np.zeros((QUERIES, 0), np.float32), np.zeros((QUERIES, 0), np.int64))]
    for number, block in enumerate(_vectors(VECTORS)):
        scores = np.concatenate([best[-1][0], queries @ block.T], 1)
        rows = np.concatenate(
            [best[-1][1], np.broadcast_to(np.arange(len(block)) + number * BLOCK, (QUERIES, len(block)))], 1
        )
        top = np.argpartition(-scores, 10, axis=1)[:, :10]
        best[-1] = (np.take_along_axis(scores, top, 1), np.take_along_axis(rows, top, 1))
    exact = [{f"{row:09d}.jpg" for row in rows} for rows in best[-1][1].tolist()]
    recall = np.mean([len(wanted & set(keys)) / 10 for wanted, keys in zip(exact, found, strict=True)])
    return {
        "records": VECTORS,
        "build_s": round(built),
        "build_mb": round(built_mb),
        "recall_at_10": round(float(recall), 4),
        "query_ms": round(float(np.median(times)), 2),
    }


def peak_mb() -> float:
    """Return the largest memory of this process so far. Linux only: getrusage would count the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(name: str, home: Path) -> dict[str, Any]:
    """Measure a case in this process."""
    before, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
    more = CASES[name][2](home)
    seconds = {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    return {"case": name, "what": CASES[name][0], **seconds, "memory_mb": round(peak_mb() - before), **more}


def markdown(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Data at size",
        "",
        f"`{conditions['command']}`, {conditions['date']}, {conditions['processor']}, 2 cores. Memory beyond the imports, at its peak.",
        "",
        "| | records | seconds | CPU seconds | memory (MB) | more |",
        "|---|---|---|---|---|---|",
    ]
    known = {"case", "what", "records", "wall_s", "cpu_s", "memory_mb", "first"}
    for row in rows:
        more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
        lines.append(
            f"| {row['what']} | {row['records']:,} | {row['wall_s']} | {row['cpu_s']} | {row['memory_mb']} | {more} |"
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
            done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
            sys.stderr.write(f"{rows[name]}\n")
    conditions = {
        "command": "python studies/data_at_size.py",
        "date": date.today().isoformat(),
        "processor": str(processor()),
    }
    ordered = [rows[name] for name in CASES if name in rows]
    target.write_text(json.dumps({"conditions": conditions, "rows": ordered}) + "\n", encoding="utf-8")
    (HERE / "data_at_size.md").write_text(markdown(ordered, conditions), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))  # noqa: T201
    else:
        main(*sys.argv[1:])
