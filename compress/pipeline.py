"""A recipe's stages, one after the other: each takes the last student and leaves an artefact in the run folder."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipress import __version__
from clipress.artifact import Artifact, load_artifact, read_header, save_artifact
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.plan import Plan, plan_from
from clipress.compress.run_folder import claimed
from clipress.compress.stage import Stage
from clipress.data.eval_sets import evalsets
from clipress.data.pairs import fingerprint
from clipress.data.teacher_cache import TeacherCache
from clipress.errors import ArtifactError
from clipress.metrics.evaluate import evaluate
from clipress.models.load import Model, TeacherSpec, artifact_from_model, model_from_open_clip, save_for_open_clip
from clipress.models.students import freeze, start_hash, student_from, towers_of_teacher
from clipress.recipe import Recipe, checked, digest
from clipress.storage import cache_folder, is_first_process
from clipress.tasks import model_from_artifact

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Say = Callable[[str], None]


def compress(recipe: Recipe, run: Path, say: Say, fresh: bool = False, wait: Say | None = None) -> list[Path]:
    """Run every stage of a recipe; stages whose inputs have not changed are taken as they are, unless all is to be `fresh`.

    Returns the artefacts' folders, in order. `wait` is for a folder that several runs share, see `claimed`.
    """
    plan = plan_from(recipe)
    with claimed(run, plan, say, fresh, wait) if is_first_process() else nullcontext():
        return _compressed(plan, run, say, fresh)


def _compressed(plan: Plan, run: Path, say: Say, fresh: bool) -> list[Path]:
    recipe = plan.recipe
    fabric = start_fabric(plan.runtime)
    say = say if fabric.is_global_zero else (lambda _: None)
    context = Context(fabric, plan.data, recipe.seed, runtime=plan.runtime, say=say)
    data = fingerprint(plan.data.train)
    folders: list[Path] = []
    brought = [bring_teacher(spec, say) for spec in plan.teachers]
    teachers = tuple(teacher.model for teacher in brought)
    lineage: tuple[dict[str, Any], ...] = ()
    if brought:
        folders.append(run / "teacher")
        lineage = brought[0].lineage
        _keep(brought[0], folders[0], plan, context, say)
    taught_by = "+".join(teacher.hash for teacher in brought) or "none"
    teacher = teachers[0] if teachers else None
    model = student_from(recipe.student, teacher, recipe.seed) if recipe.student is not None else teacher.copy()
    if recipe.student is not None:
        lineage = ({"stage": "start", "hash": start_hash(recipe.student, recipe.seed)},)
    for number, stage in enumerate(plan.stages):
        folder = run / stage.name
        record = _record(stage, recipe.seed, data, lineage, taught_by, fabric)
        checkpoints = run / "checkpoints" / f"{stage.name}-{record['hash']}"
        done = None if fresh else _finished(folder, record["hash"])
        if done:
            say(f"{stage.name}: already there, its inputs have not changed ({folder})")
            model, lineage = model_from_artifact(done), done.lineage
        else:
            say(f"{stage.name}: {stage.kind} {_settings(stage)}")
            if not context.caches:
                context = replace(context, caches=_caches(plan, brought, context, say))
            if fresh and fabric.is_global_zero:
                shutil.rmtree(checkpoints, ignore_errors=True)
            fabric.barrier()
            began = time.perf_counter()
            own = replace(
                context,
                seed=recipe.seed * 1000 + number,
                teachers=teachers,
                log=run / "logs" / f"{stage.name}.jsonl",
                checkpoints=checkpoints,
                title=stage.name,
            )
            freeze(model.module, towers_of_teacher(recipe.student))  # what was loaded or cut came back trainable
            model, details = stage.run(model, own)
            seconds = round(time.perf_counter() - began, 1)
            record |= {"details": details, "seconds": seconds, "peak_memory_mb": peak_memory_mb()}
            lineage = (*lineage, record)
            _leave(model, lineage, folder, plan, context, say)
            _forget_checkpoints(run, fabric)
        folders.append(folder)
    _forget_checkpoints(run, fabric)  # of a process that was killed right after its last stage
    return folders


def _forget_checkpoints(run: Path, fabric: Fabric) -> None:
    if fabric.is_global_zero:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _settings(stage: Stage) -> str:
    """Show every setting that is in force, defaults included."""
    shown = stage.settings.model_dump(mode="json", exclude_none=True)
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _record(
    stage: Stage, seed: int, data: str, lineage: tuple[dict[str, Any], ...], teacher: str, fabric: Fabric
) -> dict[str, Any]:
    settings = stage.settings.model_dump(mode="json")
    parent = lineage[-1]["hash"]
    known = versions()
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "settings": settings,
        "seed": seed,
        "data": data,
        "parent": parent,
        "teacher": teacher,
        "versions": known,
        "machine": machine(fabric),
        "hash": digest(stage.kind, settings, seed, data, parent, teacher, known),
    }


def machine(fabric: Fabric) -> dict[str, Any]:
    """Return what decides the last bits of a result besides settings and versions."""
    gpu = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": gpu or "cpu",
        "processes": fabric.world_size,
    }


def versions() -> dict[str, str]:
    """Return the versions that decide what a stage computes."""
    known = {"clipress": __version__}
    for package in ("torch", "open_clip_torch", "nvidia-modelopt", "lightning-fabric", "numpy"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "absent"
    return known


def peak_memory_mb() -> int:
    """Return the most memory the process, or its GPU, has held so far."""
    import resource

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def _finished(folder: Path, wanted: str) -> Artifact | None:
    """Return a stage's artefact when it is whole and was made from the same inputs."""
    try:
        if read_header(folder)["lineage"][-1]["hash"] == wanted:
            return load_artifact(folder)
    except (ArtifactError, LookupError, TypeError):
        pass
    return None


def _leave(
    model: Model, lineage: tuple[dict[str, Any], ...], folder: Path, plan: Plan, context: Context, say: Say
) -> None:
    """Measure a stage's result on the validation sets and write its artefact."""
    if context.fabric.is_global_zero:
        _write(model, lineage, _measured(model, plan), folder, say)
    context.fabric.barrier()


def _measured(model: Model, plan: Plan) -> dict[str, Any]:
    if not plan.data.val:
        return {}
    accuracy = evaluate(*model.encoders(), evalsets(plan.data.val), model.preprocess, model.tokenize())
    conditions = {"split": "val", "backend": "torch", "precision": "fp32", "data": fingerprint(plan.data.val)}
    return {"accuracy": {key: round(value, 3) for key, value in accuracy.items()}, "conditions": conditions}


def _write(model: Model, lineage: tuple[dict[str, Any], ...], metrics: dict[str, Any], folder: Path, say: Say) -> None:
    if metrics:
        say(f"{folder.name}: " + "  ".join(f"{key} {value:.1f}" for key, value in metrics["accuracy"].items()))
    artifact = artifact_from_model(model, lineage, metrics)
    save_artifact(artifact, folder, lambda aside: save_for_open_clip(model, aside / "open_clip"))
    total, in_blocks = artifact.counts["params"], artifact.counts["block_params"]
    say(f"{folder.name}: {total:,} parameters, {in_blocks:,} of them in blocks -> {folder}")


@dataclass(frozen=True)
class Teacher:
    """A teacher that was brought in: the model, what made it, and what it was measured at if it was."""

    model: Model
    lineage: tuple[dict[str, Any], ...]
    metrics: dict[str, Any] | None

    @property
    def hash(self) -> str:
        """Of everything that made it."""
        return self.lineage[-1]["hash"]


def bring_teacher(spec: TeacherSpec, say: Say) -> Teacher:
    """Load a teacher, or make it by its recipe."""
    if spec.model is not None:
        model = model_from_open_clip(spec.model, spec.checkpoint)
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
        source = compress(inner, home, say, wait=say)[-1]
    artifact = load_artifact(source)
    return Teacher(model_from_artifact(artifact), artifact.lineage, artifact.metrics)


def _caches(plan: Plan, brought: Sequence[Teacher], context: Context, say: Say) -> tuple[tuple[TeacherCache, ...], ...]:
    """Return what the teachers say of the training data, per source and teacher, where the recipe wants that kept."""
    if not any(spec.cache for spec in plan.teachers):
        return ()
    from clipress.compress.teacher_cache import caches_of

    each = [
        caches_of(t, s.cache, plan, context.fabric, say, wait=say) for t, s in zip(brought, plan.teachers, strict=True)
    ]
    return tuple(zip(*each, strict=True))


def _keep(teacher: Teacher, folder: Path, plan: Plan, context: Context, say: Say) -> None:
    """Leave a copy of the teacher in the run folder."""
    if context.fabric.is_global_zero and not _finished(folder, teacher.hash):
        metrics = _measured(teacher.model, plan) if teacher.metrics is None else teacher.metrics
        _write(teacher.model, teacher.lineage, metrics, folder, say)
    context.fabric.barrier()
