"""Check that killed jobs resume to the same bytes: `python tests/flow/kill_jobs.py [--kills N] [--out FOLDER]`.

Every kind of long job (each stage, filling a teacher cache, exporting, indexing) runs once to completion as a reference.
Then it is repeatedly started in a fresh folder, killed with SIGKILL (at a step, around a rename, or at a random time),
restarted, sometimes killed again, and left to finish. Its output must have the same bytes as the reference, with no extra
files. The seed determines every kill.

One process imports the dependencies and forks a child per job, because imports take longer than the jobs. It does no
computation and has one thread, so a fork loses none. The first reference is also made by a process that was not forked, and
the two must match.
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
calls = [0]  # Counted calls of this process.


@dataclass(frozen=True)
class Job:
    """A command with its own run folder, the stages of its recipe and the folder it must produce."""

    name: str
    stages: tuple[dict[str, Any], ...]
    makes: str
    """The folder inside the run folder that is compared; it is missing at the start."""
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
    """Shrink shards and index parts so that the tiny inputs fill several of them."""
    described = embed.manifest_of
    embed.manifest_of = lambda *given: described(*given).model_copy(update={"items_per_shard": 8})
    indexing.PART = indexing.BATCH = 8


def forked(command: list[str], log: Path, die: Callable[[], None], after: float | None = None) -> int:
    """Run a command in a forked child, killed after `after` seconds if set; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
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
        os.kill(child, signal.SIGKILL)  # This has no effect on a child that has already ended.
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_now() -> None:
    """Die without any cleanup, as in a power failure."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(count: int) -> Callable[[], None]:
    """Die in the count-th step of this process, after the gradients and before the update."""

    def arm() -> None:
        seen, update = [0], Learner.update

        def counted(self: Learner, rate: float) -> None:
            seen[0] += 1
            if seen[0] == count:
                die_now()
            update(self, rate)

        Learner.update = counted

    return arm


def at_file_call(count: int) -> Callable[[], None]:
    """Die right after the count-th call that changes the disk."""

    def arm() -> None:
        def counted(function: Callable) -> Callable:
            def call(*given: Any, **named: Any) -> Any:
                result = function(*given, **named)
                calls[0] += 1
                if calls[0] == count:
                    die_now()
                return result

            return call

        for name in FILE_CALLS:
            setattr(os, name, counted(getattr(os, name)))

    return arm


def content(folder: Path) -> dict[str, str]:
    """Return a hash of every file that must match; headers are hashed without times and memory."""
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
    """Return files that a finished job must not leave behind."""
    left = [path for path in run.rglob(".*") if path.name != storage.LOCK]
    return [str(path.relative_to(run)) for path in [*left, *run.glob("checkpoints")]]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted job: its starting folder, the hashes of its output, its duration and its number of file calls."""

    start: Path
    left: dict[str, str]
    seconds: float
    calls: int


class Bench:
    """A folder with a teacher, and a reference per job."""

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
        """Import the modules of the last child, so that later children need not."""
        for name in self.log.with_suffix(".imported").read_text(encoding="utf-8").splitlines():
            if name not in sys.modules and not name.startswith(("__", "onnxruntime")):  # ONNX Runtime starts a thread.
                with suppress(Exception):
                    importlib.import_module(name)
        if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
            raise SystemExit(f"{threads} threads found before a fork, expected 1: a child would lose the others.")

    def command(self, job: Job, run: Path) -> list[str]:
        """Return the job's command for a run folder."""
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
        """Run a job twice without a kill and check that both runs match."""
        if job.name not in self.references:
            start, run = (self.home / f"{what}-{len(self.references)}" for what in ("start", "reference"))
            if len(job.stages) > 1 or job.makes == "export":  # Earlier stages are finished.
                self._finish(self.command(replace(job, command=Job.command), run))
                shutil.rmtree(run / job.makes, ignore_errors=True)
                shutil.copytree(run, start)
            self._finish(self.command(job, run))
            wanted = content(run / job.makes)
            shutil.rmtree(run)
            if start.exists():
                shutil.copytree(start, run)
            seconds = self._finish(self.command(job, run))  # Timed without imports.
            if content(run / job.makes) != wanted:
                raise SystemExit(f"{job.name}: two uninterrupted runs differ, so kills cannot be judged.")
            made = int(self.log.with_suffix(".calls").read_text())
            self.references[job.name] = Reference(start, wanted, seconds, made)
        return self.references[job.name]

    def killed(self, job: Job, rng: random.Random) -> dict[str, Any]:
        """Kill a job once or twice, let it finish and compare."""
        known = self.reference(job)
        start, wanted, seconds = known.start, known.left, known.seconds
        run = self.home / "killed"
        shutil.rmtree(run, ignore_errors=True)
        if start.exists():
            shutil.copytree(start, run)
        moments, checkpoints = [], []
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
            moments.append("not killed: it had ended" if ended else what)
            checkpoints.append(sorted({int(p.stem.split("-")[1]) for p in run.glob("checkpoints/*/rank0-*.pt")}))
            if ended and code:
                return self._row(job, moments, checkpoints, f"exit {code}")
        code = forked(self.command(job, run), self.log, in_small_shards)
        if code:
            return self._row(job, moments, checkpoints, f"exit {code}")
        found = content(run / job.makes)
        differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        left = junk(run)
        return self._row(job, moments, checkpoints, ", ".join([*differ, *(f"left: {name}" for name in left)]))

    def _row(self, job: Job, moments: list[str], checkpoints: list[list[int]], wrong: str) -> dict[str, Any]:
        row = {"stage": job.name, "killed at": moments, "checkpoints": checkpoints, "bit-exact": not wrong}
        return row | ({"wrong": wrong} if wrong else {})


def kills_in(rows: list[dict[str, Any]]) -> int:
    """Count the kills that hit a running process."""
    return sum(not moment.startswith("not killed") for row in rows for moment in row["killed at"])


def both(*first: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls several functions in order."""

    def arm() -> None:
        for one in first:
            one()

    return arm


def forking_is_sound(bench: Bench) -> bool:
    """Return whether a process that was not forked produces the same bytes."""
    job, run = JOBS[0], bench.home / "not-forked"
    subprocess.run([sys.executable, "-m", "clipress", *bench.command(job, run)], check=True, capture_output=True)
    return content(run / job.makes) == bench.reference(job).left


def main() -> None:
    """Run the study, write its rows and exit with 1 if any work was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=60, help="total, divided among the jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=[job.name for job in JOBS], help="jobs; default: all")
    parser.add_argument("--out", type=Path, default=Path(clipress.__file__).parent / "bench" / "studies")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    jobs = [job for job in JOBS if not options.only or job.name in options.only]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as home:
        bench = Bench(Path(home))
        while kills_in(rows) < options.kills:
            for job in jobs:
                rows.append(bench.killed(job, rng))
                sys.stderr.write(f"{rows[-1]}\n")
        sound = bool(options.only) or forking_is_sound(bench)  # This check starts its own process.
    known = {
        "seed": options.seed,
        "processor": platform.processor() or platform.machine(),
        "clipress": clipress.__version__,
    }
    conditions = known | {"torch": torch.__version__, "steps": STEPS, "checkpoint every": EVERY, "threads": 1}
    result = {"conditions": conditions, "a process not forked agrees": None if options.only else sound, "kills": rows}
    text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=1)[:-2]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "faults_kills.json").write_text(f'{head},\n "kills": [\n{text}\n ]\n}}\n', encoding="utf-8")
    lost = [row for row in rows if not row["bit-exact"]]
    sys.stdout.write(f"{kills_in(rows)} kills, {len(lost)} losses\n")
    raise SystemExit(1 if lost or not sound else 0)


if __name__ == "__main__":
    main()
