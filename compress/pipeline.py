"""A recipe's stages, one after the other: each takes the last student and leaves an artifact in the run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
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
from clipress.data.eval_sets import evalsets
from clipress.data.sources import fingerprint
from clipress.data.teacher_cache import TeacherCache
from clipress.errors import ArtifactError
from clipress.metrics.outcomes import percents
from clipress.models.load import Model, TeacherSpec, artifact_from_model
from clipress.models.students import freeze, start_hash
from clipress.recipe import Recipe, checked, digest
from clipress.storage import cache_folder, is_first_process
from clipress.tasks import evaluate_model, model_from_artifact, task_named

Say = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """What the stages so far have made."""

    model: Model
    lineage: Lineage


def compress(plan: CompressPlan, run: Path, say: Say, fresh: bool = False, wait: Say | None = None) -> list[Path]:
    """Run every stage of a recipe; a finished stage whose inputs have not changed is reused, unless `fresh`.

    Returns the artifacts' folders, in order. `wait` is for a folder that several runs share, see `lock_run_folder`.
    """
    with lock_run_folder(run, plan, say, fresh, wait) if is_first_process() else nullcontext():
        return _Pipeline(plan, run, say, fresh).run_stages()


class _Pipeline:
    """One run of a recipe: what its stages share."""

    def __init__(self, plan: CompressPlan, run: Path, say: Say, fresh: bool) -> None:
        self.plan, self.recipe, self.run, self.fresh = plan, plan.recipe, run, fresh
        self.task = task_named(plan.recipe.task)
        self.fabric = start_fabric(plan.runtime)
        self.say = say if self.fabric.is_global_zero else (lambda _: None)
        self.teachers = [load_teacher(spec, self.recipe.task, self.say) for spec in plan.teachers]
        self.context = Context(self.fabric, plan.data, self.recipe.seed, runtime=plan.runtime, say=self.say)
        self.data = fingerprint(plan.data.train)
        self.taught_by = "+".join(teacher.hash for teacher in self.teachers) or "none"

    def run_stages(self) -> list[Path]:
        """Run what is not finished; returns the artifacts' folders, in order."""
        folders = [self.run / "teacher"] if self.teachers else []
        if self.teachers:
            self._keep_teacher(folders[0])
        made = self._start()
        for number, stage in enumerate(self.plan.stages):
            folders.append(self.run / stage.name)
            made = self._run_stage(number, stage, made)
        self._clear_checkpoints()  # of a process that was killed right after its last stage
        return folders

    def _start(self) -> Made:
        """Return the student that the first stage gets."""
        section, teacher = self.recipe.student, self.teachers[0] if self.teachers else None
        if section is None:
            return Made(teacher.model.copy(), teacher.lineage)
        student = self.task.student_from(section, teacher.model if teacher else None, self.recipe.seed)
        return Made(student, ({"stage": "start", "hash": start_hash(section, self.recipe.seed)},))

    def _run_stage(self, number: int, stage: Stage, made: Made) -> Made:
        folder = self.run / stage.name
        record = record_of(stage, self.recipe.seed, self.data, made.lineage, self.taught_by, self.fabric)
        checkpoints = self.run / "checkpoints" / f"{stage.name}-{record['hash']}"
        done = None if self.fresh else _finished(folder, record["hash"])
        if done:
            self.say(f"{stage.name}: reused, its inputs have not changed ({folder})")
            return Made(model_from_artifact(done), done.lineage)
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
        # a model that was loaded or cut has everything trainable again
        freeze(made.model.module, self.task.towers_of_teacher(self.recipe.student))
        model, details = stage.run(made.model, context)
        record |= {
            "details": details,
            "seconds": round(time.perf_counter() - began, 1),
            "peak_memory_mb": peak_memory_mb(),
        }
        made = Made(model, (*made.lineage, record))
        self._save(made, None, folder)
        self._clear_checkpoints()
        return made

    def _keep_teacher(self, folder: Path) -> None:
        """Leave a copy of the teacher in the run folder."""
        teacher = self.teachers[0]
        if self.fabric.is_global_zero and not _finished(folder, teacher.hash):
            self._write(Made(teacher.model, teacher.lineage), teacher.metrics, folder)
        self.fabric.barrier()

    def _save(self, made: Made, metrics: dict[str, Any] | None, folder: Path) -> None:
        if self.fabric.is_global_zero:
            self._write(made, metrics, folder)
        self.fabric.barrier()

    def _write(self, made: Made, metrics: dict[str, Any] | None, folder: Path) -> None:
        """Write an artifact, measured on the validation sets unless it has been."""
        metrics = self._measure(made.model) if metrics is None else metrics
        if metrics:
            self.say(f"{folder.name}: " + "  ".join(f"{key} {value:.1f}" for key, value in metrics["accuracy"].items()))
        artifact = artifact_from_model(made.model, made.lineage, metrics)
        save_artifact(artifact, folder, lambda aside: self.task.save_for_library(made.model, aside / "open_clip"))
        total, in_blocks = artifact.counts["params"], artifact.counts["block_params"]
        self.say(f"{folder.name}: {total:,} parameters, {in_blocks:,} of them in blocks -> {folder}")

    def _measure(self, model: Model) -> dict[str, Any]:
        sets = self.plan.data.val
        if not sets:
            return {}
        accuracy = percents(evaluate_model(model, evalsets(sets)))
        conditions = {"split": "val", "backend": "torch", "precision": "fp32", "data": fingerprint(sets)}
        return {"accuracy": {key: round(value, 3) for key, value in accuracy.items()}, "conditions": conditions}

    def _caches(self) -> tuple[tuple[TeacherCache, ...], ...]:
        """Return the teachers' cached outputs of the training data, per source and teacher, where the recipe has them."""
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
    """Show every setting in force, defaults included."""
    shown = stage.settings.model_dump(mode="json", exclude_none=True)
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _finished(folder: Path, wanted: str) -> Artifact | None:
    """Return a stage's artifact when it is whole and was made from the same inputs."""
    try:
        if read_header(folder)["lineage"][-1]["hash"] == wanted:
            return load_artifact(folder)
    except (ArtifactError, LookupError, TypeError):
        pass
    return None


def load_teacher(spec: TeacherSpec, task: str, say: Say) -> Teacher:
    """Load a teacher, or make it by its recipe; `task` is for one that is named by its library's name."""
    if spec.model is not None:
        model = task_named(task).load_pretrained(spec.model, spec.checkpoint, "teacher")
        weights = digest(
            *(f"{name} {tensor.double().sum().item()!r}" for name, tensor in model.module.state_dict().items())
        )
        known = {"stage": "teacher", "model": spec.model, "checkpoint": spec.checkpoint, "hash": weights}
        return Teacher(model, (known,), None)
    source: Artifact | Path = spec.artifact
    if spec.recipe is not None:
        inner = checked(Recipe, spec.recipe, "teacher.recipe")
        home = cache_folder() / "teachers" / f"{inner.name}-{digest(inner.model_dump(), versions())}"
        say(f"teacher: from recipe '{inner.name}', kept in {home}")
        source = compress(compress_plan_from(inner), home, say, wait=say)[-1]
    artifact = load_artifact(source)
    return Teacher(model_from_artifact(artifact), artifact.lineage, artifact.metrics)
