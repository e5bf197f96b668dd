"""How fast is the page? `python studies/page.py [RUN ...]`: `clipress demo` in Chromium without a screen, on a made camera.

Without runs, a ViT-B/32 with random weights is cut to 25 % of its blocks and quantized first, since speed depends on shapes alone. Every
model of a run is shown by a page of its own; frames are counted as the page shows them. Writes page.json and page.md beside this file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from PIL import Image

from clipress.studies.browser import opened_browser, write_video
from clipress.studies.speed import conditions_of, write_tables

RECIPE = {
    "name": "ViT-B-32, 25 % of the blocks",
    "teacher": {"model": "ViT-B-32", "checkpoint": "random"},
    "data": {
        "train": [{"format": "scenes", "limit": 64}],
        "val": [{"format": "scenes", "split": "val", "limit": 16}],
    },
    "stages": [
        {"prune": {"budget": {"params": 0.25}, "steps": 0, "refit": False, "rotate": False, "calibrate": 64, "batch_size": 16}},
        {"quantize": {"steps": 0, "calibrate": 64, "batch_size": 16}},
    ],
    "bench": {"batch": [1], "duration": 200},
}  # fmt: skip
SECONDS = 20
COUNT = """(seconds) => new Promise((done) => {
  let frames = 0;
  const figure = document.querySelector("[data-figure=run]"); // It is written once per frame.
  new MutationObserver(() => frames++).observe(figure, {childList: true});
  setTimeout(() => done(frames / seconds), 1000 * seconds);
})"""


def clipress(*words: str | Path) -> list[str]:
    """Return the command line of a command."""
    return [sys.executable, "-m", "clipress", *map(str, words)]


def made(home: Path) -> Path:
    """Return a run of `RECIPE` in a folder."""
    recipe, run = home / "recipe.yaml", home / "ViT-B-32-25"
    recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    subprocess.run(clipress("run", recipe, "--out", run), check=True)
    return run


@contextmanager
def served(run: Path, stage: str) -> Iterator[str]:
    """Serve the page of a model; yield its address."""
    command = clipress("demo", run, "--stage", stage, "--labels", "a dog,a cat,a bicycle", "--no-open")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield next(found[0] for line in server.stdout or () if (found := re.search(r"http://\S+", line)))
        finally:
            server.terminate()


def row_of(run: Path, stage: str, camera: Path) -> dict[str, Any]:
    """Measure the view Classify of a model: seconds until its first answer, then frames per second."""
    with served(run, stage) as url, opened_browser(camera) as (context, said):
        page = context.new_page()
        start = time.perf_counter()
        page.goto(url)
        page.locator("article li").first.wait_for()
        ready = time.perf_counter() - start
        page.wait_for_timeout(3000)  # The first frames are slower.
        frames = page.evaluate(COUNT, SECONDS)
        last = [page.locator(f"[data-figure={name}]").first.inner_text() for name in ("run", "prepare")]
        browser = f"Chromium {context.browser.version if context.browser else ''}"
        if said:
            raise SystemExit(f"the page said: {said}")
    megabytes = sum(path.stat().st_size for path in (run / "export" / stage).glob("image.onnx*")) / 1e6
    return {
        **{
            "run": run.name,
            "stage": stage,
            "browser": browser,
            "image_mb": megabytes,
            "ready_s": ready,
            "frames_s": frames,
        },
        **{"model": last[0], "preparing": last[1]},
    }


def markdown(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Return the page's table, as it is checked in."""
    lines = [
        "# The page of `clipress demo`, in WebAssembly\n",
        f"`{conditions['command']}`, {conditions['date']}, {conditions['processor']}, {conditions['cores']} cores, load "
        f"{conditions['load']}, {rows[0]['browser']} without a screen or a GPU, a camera of 640 x 480 at 30 frames/s, three "
        f"labels. Frames/s over {SECONDS} s; a camera's own rate is the most there can be.\n",
        "| run | model | image tower, MB | first answer, s | frames/s | model, last frame | preparing, last frame |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = " | ".join(f"{row[name]:.1f}" for name in ("image_mb", "ready_s", "frames_s"))
        lines.append(f"| {row['run']} | {row['stage']} | {numbers} | {row['model']} | {row['preparing']} |")
    return "\n".join(lines) + "\n"


def main(*runs: str) -> None:
    """Measure the models of runs, by default of one that is made."""
    with TemporaryDirectory() as home:
        picture = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(picture).resize((640, 480), Image.Resampling.BICUBIC))
        camera = write_video(Path(home) / "camera.y4m", smooth)
        chosen = [Path(run) for run in runs] or [made(Path(home))]
        conditions = conditions_of(" ".join(["python studies/page.py", *(run.as_posix() for run in chosen if runs)]))
        rows = [
            row_of(run, stage.name, camera)
            for run in chosen
            for stage in sorted((run / "export").iterdir())
            if stage.is_dir()
        ]
    write_tables("page", rows, conditions, markdown(rows, conditions))


if __name__ == "__main__":
    main(*sys.argv[1:])
