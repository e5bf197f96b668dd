"""Does a killed job end where an unkilled one ends? `python tests/flow/kill_jobs.py [--kills N] [--out FOLDER]`.

Every kind of long job (each stage, filling a teacher cache, exporting, indexing) is run once to its end. Then, again and again, it is
started on a fresh folder, killed with SIGKILL (at a step, around a rename, or at any moment), started anew, maybe killed
again, and left to end. What it leaves must be the same bytes, with nothing besides. A seed decides every kill.

One process imports what the jobs need and forks a child per job, since importing takes longer than the jobs. It computes
nothing itself and has one thread, so no thread is lost in a fork; the first reference is also made by a process that was
not forked, and the two must agree.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml

import clipress
from clipress import artifact, storage
from clipress.cli import main as clipress_command
from clipress.compress import teacher_cache as embed
from clipress.compress.learner import Learner
from clipress.models.tiny import tiny_architecture
from clipress.serve import indexing

STEPS, EVERY = 12, 3
SHORT = {"steps": STEPS, "batch_size": 16, "lr": 1e-3}
PRUNE = {
    "budget": {"params": 0.6},
    "align": {"head_dim": 4, "ffn": 16},
    "update_every": 2,
    "distill_losses": ["affinity"],
    **SHORT,
}
UPOP = PRUNE | {"criterion": "upop", "schedule": "sine", "distill_losses": []}
UPOP_GUIDED = UPOP | {"distill_losses": ["affinity", "feature"]}
DISTILL = {"losses": {"contrastive": 1.0, "feature": 10.0, "momentum-contrastive": 1.0}, "queue_size": 16, **SHORT}
DATA = {
    "train": [{"format": "scenes", "weight": 3, "limit": 48}, {"format": "digits", "limit": 48}],
    "augment": {"shift": 1},
}
FILE_CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
calls = [0]  # made by this process, where they are counted


@dataclass(frozen=True)
class Job:
    """A command on a run folder of its own, what it has at its start, and what it is to leave."""

    name: str
    stages: tuple[dict[str, Any], ...]
    makes: str
    """Folder in the run folder that is compared; it is not there at the start."""
    command: tuple[str, ...] = ("compress", "RECIPE", "--out", "RUN")
    trains: bool = True


JOBS = (
    Job("distill", ({"distill": {**DISTILL, "name": "made"}},), "made"),
    Job("prune, fisher, guided", ({"prune": {**PRUNE, "name": "made"}},), "made"),
    Job("prune, upop", ({"prune": {**UPOP, "name": "made"}},), "made"),
    Job("prune, upop, guided", ({"prune": {**UPOP_GUIDED, "name": "made"}},), "made"),
    Job("recovery", ({"prune": {**PRUNE, "steps": 4}}, {"distill": {**DISTILL, "name": "made"}}), "made"),
    Job("sparsify, magnitude, fine-tune", ({"sparsify": {**SHORT, "name": "made"}},), "made"),
    Job(
        "sparsify, sparsegpt",
        ({"sparsify": {**SHORT, "method": "sparsegpt", "calibrate": 16, "name": "made"}},),
        "made",
    ),
    Job("quantize, QAT", ({"quantize": {**SHORT, "calibrate": 16, "name": "made"}},), "made"),
    Job(
        "embed",
        ({"distill": {**SHORT, "name": "unused"}},),
        "caches",
        ("embed", "RECIPE", "--out", "RUN/caches"),
        False,
    ),
    Job("export", ({"prune": {**PRUNE, "steps": 4}},), "export", ("export", "RUN"), False),
    Job(
        "index",
        (),
        "index",
        ("index", "HOME/images", "--out", "RUN/index", "--model", "HOME/teacher/export/teacher"),
        False,
    ),
)


def in_small_shards() -> None:
    """Let the tiny sources fill several shards, and the pictures of an index several parts."""
    described = embed.manifest_of
    embed.manifest_of = lambda *given: described(*given).model_copy(update={"items_per_shard": 8})
    indexing.PART = indexing.BATCH = 8


def forked(command: list[str], log: Path, die: Callable[[], None], after: float | None = None) -> int:
    """Run a command in a forked child, killed `after` seconds if asked; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(told, 1)
            os.dup2(told, 2)
            die()
            clipress_command(command, standalone_mode=True)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            log.with_suffix(".calls").write_text(str(calls[0]))
            log.with_suffix(".imported").write_text("\n".join(sys.modules), encoding="utf-8")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # which does nothing to a child that has ended and was not waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def now() -> None:
    """Die, as a machine does that loses its power: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(count: int) -> Callable[[], None]:
    """Die in the count-th step of this process, between its gradients and the update."""

    def arm() -> None:
        seen, update = [0], Learner.update

        def counted(self: Learner, rate: float) -> None:
            seen[0] += 1
            if seen[0] == count:
                now()
            update(self, rate)

        Learner.update = counted

    return arm


def at_file_call(count: int) -> Callable[[], None]:
    """Die right after the count-th call that changes what is on the disk."""

    def arm() -> None:
        def counted(function: Callable) -> Callable:
            def call(*given: Any, **named: Any) -> Any:
                result = function(*given, **named)
                calls[0] += 1
                if calls[0] == count:
                    now()
                return result

            return call

        for name in FILE_CALLS:
            setattr(os, name, counted(getattr(os, name)))

    return arm


def content(folder: Path) -> dict[str, str]:
    """Return a hash of every file that must be the same, and of what a header says aside from times and memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != storage.LOCK:
            raw = path.read_bytes()
            if path.name == artifact.HEADER:
                header = json.loads(raw)
                for record in header["lineage"]:
                    for key in ("seconds", "peak_memory_mb"):
                        record.pop(key, None)
                        record.get("details", {}).pop(key, None)
                raw = json.dumps(header, sort_keys=True).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(raw).hexdigest()
    return found


def junk(run: Path) -> list[str]:
    """Return what a job should not have left."""
    left = [path for path in run.rglob(".*") if path.name != storage.LOCK]
    return [str(path.relative_to(run)) for path in [*left, *run.glob("checkpoints")]]


@dataclass(frozen=True)
class Reference:
    """What an unkilled job starts from, what it leaves, its seconds, and how often it changed what is on the disk."""

    start: Path
    left: dict[str, str]
    seconds: float
    calls: int


class Bench:
    """A folder with a teacher, and per job its recipe, its start and its reference."""

    def __init__(self, home: Path) -> None:
        self.home, self.log = home, home / "log.txt"
        self.references: dict[str, Reference] = {}
        os.environ["CLIPRESS_CACHE"] = str(home / "cache")
        inner = {
            "name": "teacher",
            "student": tiny_architecture(layers=1),
            "data": DATA,
            "stages": [{"distill": {"losses": ["contrastive"], **SHORT, "name": "teacher"}}],
        }
        inner["export"] = {"onnx": {"exporter": "torchscript"}}
        for command in (
            ["compress", self._write("teacher", inner), "--out", str(home / "teacher")],
            ["export", str(home / "teacher")],
            ["data", "images", str(home / "images"), "--count", "40"],
        ):
            self._finish(command)

    def _write(self, name: str, recipe: dict[str, Any]) -> str:
        path = self.home / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return str(path)

    def _finish(self, command: list[str]) -> float:
        began = time.perf_counter()
        code = forked(command, self.log, both(in_small_shards, at_file_call(0)))
        if code:
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{self.log.read_text()[-2000:]}")
        seconds = time.perf_counter() - began
        self._import_what_it_needed()
        return seconds

    def _import_what_it_needed(self) -> None:
        """Spare the children to come what the last one spent most of its time with."""
        for name in self.log.with_suffix(".imported").read_text(encoding="utf-8").splitlines():
            if name not in sys.modules and not name.startswith(("__", "onnxruntime")):  # which starts a thread
                with suppress(Exception):
                    importlib.import_module(name)
        if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
            raise SystemExit(f"{threads} threads are there before a fork: a child would lack all but one.")

    def command(self, job: Job, run: Path) -> list[str]:
        """Return the job's command on a folder."""
        recipe = {
            "name": "killed",
            "teacher": {"artifact": str(self.home / "teacher" / "teacher")},
            "data": DATA,
            "stages": list(job.stages),
            "runtime": {"accelerator": "cpu", "checkpoint_every": EVERY},
            "export": {"onnx": {"exporter": "torchscript"}},
        }
        path = self._write("recipe", recipe)
        stands_for = {"RECIPE": path, "RUN": str(run), "HOME": str(self.home)}
        found = list(job.command)
        for name, value in stands_for.items():
            found = [word.replace(name, value) for word in found]
        return found

    def reference(self, job: Job) -> Reference:
        """Run a job to its end, twice, and see that both leave the same."""
        if job.name not in self.references:
            start, run = (self.home / f"{what}-{len(self.references)}" for what in ("start", "reference"))
            if len(job.stages) > 1 or job.makes == "export":  # what comes before is finished
                self._finish(self.command(replace(job, command=Job.command), run))
                shutil.rmtree(run / job.makes, ignore_errors=True)
                shutil.copytree(run, start)
            self._finish(self.command(job, run))
            wanted = content(run / job.makes)
            shutil.rmtree(run)
            if start.exists():
                shutil.copytree(start, run)
            seconds = self._finish(self.command(job, run))  # now without its imports
            if content(run / job.makes) != wanted:
                raise SystemExit(f"{job.name}: two runs that nobody killed differ, so nothing can be told.")
            made = int(self.log.with_suffix(".calls").read_text())
            self.references[job.name] = Reference(start, wanted, seconds, made)
        return self.references[job.name]

    def killed(self, job: Job, rng: random.Random) -> dict[str, Any]:
        """Kill a job once or twice, let it end, and compare."""
        known = self.reference(job)
        start, wanted, seconds = known.start, known.left, known.seconds
        run = self.home / "killed"
        shutil.rmtree(run, ignore_errors=True)
        if start.exists():
            shutil.copytree(start, run)
        told, checkpoints = [], []
        for _ in range(rng.choice((1, 1, 2))):
            how = rng.choice(("step", "file call", "time") if job.trains else ("file call", "time"))
            arm, after = in_small_shards, None
            if how == "step":
                count = rng.randint(1, STEPS)
                what, arm = f"step {count} of the process", both(in_small_shards, at_step(count))
            elif how == "file call":
                count = rng.randint(1, known.calls)
                what, arm = f"file call {count} of the process", both(in_small_shards, at_file_call(count))
            else:
                after = rng.uniform(0.02, seconds)
                what = f"{after:.2f} of {seconds:.2f} s"
            code = forked(self.command(job, run), self.log, arm, after)
            ended = code != -signal.SIGKILL
            told.append("not killed: it had ended" if ended else what)
            checkpoints.append(sorted({int(p.stem.split("-")[1]) for p in run.glob("checkpoints/*/rank0-*.pt")}))
            if ended and code:
                return self._row(job, told, checkpoints, f"exit {code}")
        code = forked(self.command(job, run), self.log, in_small_shards)
        if code:
            return self._row(job, told, checkpoints, f"exit {code}")
        found = content(run / job.makes)
        differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        left = junk(run)
        return self._row(job, told, checkpoints, ", ".join([*differ, *(f"left: {name}" for name in left)]))

    def _row(self, job: Job, told: list[str], checkpoints: list[list[int]], wrong: str) -> dict[str, Any]:
        row = {"stage": job.name, "killed at": told, "checkpoints": checkpoints, "bit-exact": not wrong}
        return row | ({"wrong": wrong} if wrong else {})


def kills_in(rows: list[dict[str, Any]]) -> int:
    """Count the kills that found a process alive."""
    return sum(not told.startswith("not killed") for row in rows for told in row["killed at"])


def both(*first: Callable[[], None]) -> Callable[[], None]:
    """Do several things in a row."""

    def arm() -> None:
        for one in first:
            one()

    return arm


def forking_is_sound(bench: Bench) -> bool:
    """Tell whether a process that was not forked leaves the same bytes."""
    job, run = JOBS[0], bench.home / "not-forked"
    subprocess.run([sys.executable, "-m", "clipress", *bench.command(job, run)], check=True, capture_output=True)
    return content(run / job.makes) == bench.reference(job).left


def main() -> None:
    """Run the study, write its rows, and end with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=60, help="in all; each job gets its part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=[job.name for job in JOBS], help="jobs; default: all")
    parser.add_argument("--out", type=Path, default=Path(clipress.__file__).parent / "bench" / "studies")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(asked.seed)
    jobs = [job for job in JOBS if not asked.only or job.name in asked.only]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as home:
        bench = Bench(Path(home))
        while kills_in(rows) < asked.kills:
            for job in jobs:
                rows.append(bench.killed(job, rng))
                sys.stderr.write(f"{rows[-1]}\n")
        sound = bool(asked.only) or forking_is_sound(bench)  # which takes a process of its own
    known = {
        "seed": asked.seed,
        "processor": platform.processor() or platform.machine(),
        "clipress": clipress.__version__,
    }
    conditions = known | {"torch": torch.__version__, "steps": STEPS, "checkpoint every": EVERY, "threads": 1}
    result = {"conditions": conditions, "a process not forked agrees": None if asked.only else sound, "kills": rows}
    text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=1)[:-2]
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "faults_kills.json").write_text(f'{head},\n "kills": [\n{text}\n ]\n}}\n', encoding="utf-8")
    lost = [row for row in rows if not row["bit-exact"]]
    sys.stdout.write(f"{kills_in(rows)} kills, {len(lost)} losses\n")
    raise SystemExit(1 if lost or not sound else 0)


if __name__ == "__main__":
    main()
