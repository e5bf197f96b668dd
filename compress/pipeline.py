"""Run a recipe's stages in order: each takes the previous student and writes an artifact into the run folder."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipress.artifact import Artifact, load_artifact, read_header, save_artifact
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.lineage import Lineage, peak_memory_mb, record_of, versions
from clipress.compress.plan import CompressPlan, compress_plan_from
from clipress.compress.run_folder import lock_run_folder
from clipress.compress.stage import Stage
from clipress.compress.teacher_cache import caches_of
from clipress.compress.teachers import Teacher
from clipress.data.bad_records import RECORDED
from clipress.data.eval_sets import evalsets, unread_in
from clipress.data.sources import fingerprint
from clipress.data.teacher_cache import TeacherCache
from clipress.errors import ArtifactError
from clipress.metrics.outcomes import percents
from clipress.models.load import Model, TeacherSpec, artifact_from_model
from clipress.models.students import freeze, start_hash
from clipress.progress import Say
from clipress.recipe import Recipe, checked, digest
from clipress.storage import cache_folder, is_first_process
from clipress.tasks import evaluate_model, model_from_artifact, task_named


@dataclass(frozen=True)
class Student:
    """The student after the latest stage, with the records of all stages so far."""

    model: Model
    lineage: Lineage


def compress(plan: CompressPlan, run: Path, say: Say, fresh: bool = False, wait: Say | None = None) -> list[Path]:
    """Run every stage of a recipe. Finished stages whose inputs have not changed are reused, unless `fresh`.

    Returns the artifacts' folders, in order. `wait` is for folders that several runs share, see `lock_run_folder`.
    """
    with lock_run_folder(run, plan, say, fresh, wait) if is_first_process() else nullcontext():
        return _Pipeline(plan, run, say, fresh).run_stages()


class _Pipeline:
    """One run of a recipe."""

    def __init__(self, plan: CompressPlan, run: Path, say: Say, fresh: bool) -> None:
        self.plan, self.recipe, self.run, self.fresh = plan, plan.recipe, run, fresh
        self.task = task_named(plan.recipe.task)
        self.fabric = start_fabric(plan.runtime)
        self.say = say if self.fabric.is_global_zero else (lambda _: None)
        self.teachers = [load_teacher(spec, self.recipe.task, self.say) for spec in plan.teachers]
        self.context = Context(self.fabric, plan.data, self.recipe.seed, runtime=plan.runtime, say=self.say)
        self.data = fingerprint(plan.data.train)
        self.teacher_hash = "+".join(teacher.hash for teacher in self.teachers) or "none"

    def run_stages(self) -> list[Path]:
        """Run the stages that are not finished. Returns the artifacts' folders, in order."""
        folders = [self.run / "teacher"] if self.teachers else []
        if self.teachers:
            self._save_teacher(folders[0])
        student = self._initial_student()
        for number, stage in enumerate(self.plan.stages):
            folders.append(self.run / stage.name)
            student = self._run_stage(number, stage, student)
        self._clear_checkpoints()  # a process killed right after its last stage leaves some behind
        return folders

    def _initial_student(self) -> Student:
        """Build the student for the first stage."""
        section, teacher = self.recipe.student, self.teachers[0] if self.teachers else None
        if section is None:
            return Student(teacher.model.copy(), teacher.lineage)
        model = self.task.student_from(section, teacher.model if teacher else None, self.recipe.seed)
        return Student(model, ({"stage": "start", "hash": start_hash(section, self.recipe.seed)},))

    def _run_stage(self, number: int, stage: Stage, student: Student) -> Student:
        folder = self.run / stage.name
        record = record_of(stage, self.recipe.seed, self.data, student.lineage, self.teacher_hash, self.fabric)
        checkpoints = self.run / "checkpoints" / f"{stage.name}-{record['hash']}"
        done = None if self.fresh else _finished(folder, record["hash"])
        if done:
            self.say(f"{stage.name}: reused, its inputs have not changed ({folder})")
            return Student(model_from_artifact(done), done.lineage)
        self.say(f"{stage.name}: {stage.kind} {_settings(stage)}")
        if not self.context.caches:
            self.context = replace(self.context, caches=self._caches())
        if self.fresh and self.fabric.is_global_zero:
            shutil.rmtree(checkpoints, ignore_errors=True)
        self.fabric.barrier()
        began = time.perf_counter()
        context = replace(
            self.context,
            seed=self.recipe.seed * 1000 + number,
            teachers=tuple(teacher.model for teacher in self.teachers),
            log=self.run / "logs" / f"{stage.name}.jsonl",
            checkpoints=checkpoints,
            title=stage.name,
        )
        # Loading and cutting make every parameter trainable again.
        freeze(student.model.module, self.task.towers_of_teacher(self.recipe.student))
        model, details = stage.run(student.model, context)
        if bad := context.bad_records.different:
            details = {**details, RECORDED: bad}
        record |= {
            "details": details,
            "seconds": round(time.perf_counter() - began, 1),
            "peak_memory_mb": peak_memory_mb(),
        }
        student = Student(model, (*student.lineage, record))
        self._save(student, None, folder)
        self._clear_checkpoints()
        return student

    def _save_teacher(self, folder: Path) -> None:
        """Save a copy of the teacher in the run folder."""
        teacher = self.teachers[0]
        if self.fabric.is_global_zero and not _finished(folder, teacher.hash):
            self._write(Student(teacher.model, teacher.lineage), teacher.metrics, folder)
        self.fabric.barrier()

    def _save(self, student: Student, metrics: dict[str, Any] | None, folder: Path) -> None:
        if self.fabric.is_global_zero:
            self._write(student, metrics, folder)
        self.fabric.barrier()

    def _write(self, student: Student, metrics: dict[str, Any] | None, folder: Path) -> None:
        """Write an artifact; evaluate it on the validation sets if `metrics` is None."""
        metrics = self._measure(student.model) if metrics is None else metrics
        if metrics:
            self.say(f"{folder.name}: " + "  ".join(f"{key} {value:.1f}" for key, value in metrics["accuracy"].items()))
        artifact = artifact_from_model(student.model, student.lineage, metrics)
        save_artifact(artifact, folder, lambda aside: self.task.save_for_library(student.model, aside / "open_clip"))
        total, in_blocks = artifact.counts["params"], artifact.counts["block_params"]
        self.say(f"{folder.name}: {total:,} parameters, {in_blocks:,} of them in blocks -> {folder}")

    def _measure(self, model: Model) -> dict[str, Any]:
        specs = self.plan.data.val
        if not specs:
            return {}
        sets = evalsets(specs)
        accuracy = percents(evaluate_model(model, sets))
        conditions = {"split": "val", "backend": "torch", "precision": "fp32", "data": fingerprint(specs)}
        if unread := unread_in(sets):
            conditions["unread"] = unread
        return {"accuracy": {key: round(value, 3) for key, value in accuracy.items()}, "conditions": conditions}

    def _caches(self) -> tuple[tuple[TeacherCache, ...], ...]:
        """Open the teacher caches, per source and teacher; empty if the recipe has no `teacher.cache`."""
        specs = self.plan.teachers
        if not any(spec.cache for spec in specs):
            return ()
        each = [
            caches_of(teacher, spec.cache, self.plan, self.fabric, self.say, wait=self.say)
            for teacher, spec in zip(self.teachers, specs, strict=True)
        ]
        return tuple(zip(*each, strict=True))

    def _clear_checkpoints(self) -> None:
        if self.fabric.is_global_zero:
            shutil.rmtree(self.run / "checkpoints", ignore_errors=True)


def _settings(stage: Stage) -> str:
    """Format the settings in force, defaults included."""
    shown = stage.settings.model_dump(mode="json", exclude_none=True)
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _finished(folder: Path, stage_hash: str) -> Artifact | None:
    """Return a stage's artifact if it is complete and was made from the same inputs."""
    try:
        if read_header(folder)["lineage"][-1]["hash"] == stage_hash:
            return load_artifact(folder)
    except (ArtifactError, LookupError, TypeError):
        pass
    return None


def load_teacher(spec: TeacherSpec, task: str, say: Say) -> Teacher:
    """Load a teacher, or build it from its recipe. `task` decides which library a `model` name refers to."""
    if spec.model is not None:
        model = task_named(task).load_pretrained(spec.model, spec.checkpoint, "teacher", spec.weights)
        weights = digest(
            model.architecture,
            model.preprocess.model_dump(),
            *(f"{name} {tensor.double().sum().item()!r}" for name, tensor in model.module.state_dict().items()),
        )
        known = {"stage": "teacher", "model": spec.model, "checkpoint": spec.checkpoint, "hash": weights}
        return Teacher(model, (known,), None)
    source: Artifact | Path = spec.artifact
    if spec.recipe is not None:
        inner = checked(Recipe, spec.recipe, "teacher.recipe")
        home = cache_folder() / "teachers" / f"{inner.name}-{digest(inner.model_dump(), versions())}"
        say(f"teacher: from recipe '{inner.name}', stored in {home}")
        source = compress(compress_plan_from(inner), home, say, wait=say)[-1]
    artifact = load_artifact(source)
    return Teacher(model_from_artifact(artifact), artifact.lineage, artifact.metrics)
