"""What a recipe's stages would need, before any of them runs: parameters, steps, memory, sizes of checkpoints and artifacts.

Models are built on torch's meta device, without weights, and each stage is applied to their shapes. Which units a search will
cut is unknown, but its budget and its rounding are not: units of equal worth are cut until the budget holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from clipress.artifact import read_header
from clipress.compress.context import Context, steps_of
from clipress.compress.dry_run import (
    PlannedFabric,
    Rehearsal,
    StepNeeds,
    StepTime,
    bytes_of,
    random_values_of,
    shapes_of,
    shapes_only,
    step_needs,
    timed_step,
)
from clipress.compress.fabric import accelerator_of, start_fabric
from clipress.compress.losses import Loss, needs_of, terms_from
from clipress.compress.plan import CompressPlan, compress_plan_from
from clipress.compress.prune.budget import keep_masks
from clipress.compress.prune.criterion import CRITERIA
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.search import Prune, groups_of
from clipress.compress.quantize import AUTO, Quantize
from clipress.compress.settings import Training
from clipress.compress.sparsify import Sparsify, two_of_four_names
from clipress.compress.stage import Stage
from clipress.data.cache_files import CacheSettings
from clipress.data.dataset import TrainingSet
from clipress.data.padding import without_padding
from clipress.data.sampler import Batches
from clipress.data.sources import num_captions, open_source, readable_captions
from clipress.data.transforms import Preprocess
from clipress.errors import first_line
from clipress.models import anatomy, convnets, quantizers, students, surgery
from clipress.models.importers import local_folder
from clipress.models.load import Model, TeacherSpec
from clipress.models.text_length import text_ends
from clipress.recipe import Recipe, checked
from clipress.tasks import task_named

TEXTS = 2048  # items of a batch whose captions are tokenized to find their length
VIEW_BYTES, CAPTION_BYTES, ITEM_BYTES = 28, 8, 25  # of a teacher cache beside the embeddings, see data/cache_files.py


@dataclass(frozen=True)
class TeacherForecast:
    """One teacher."""

    name: str
    params: int
    cache_bytes: int | None
    """Its embeddings of the training data on disk; None for a teacher that runs."""
    stages: tuple[StageForecast, ...]
    """The stages that make it, unless it is there already."""


@dataclass(frozen=True)
class StageForecast:
    """One stage."""

    name: str
    kind: str
    params: int
    """Parameters of the student that the stage starts from."""
    params_after: int
    steps: int
    """0 for a stage without training."""
    pairs: int
    """Items seen in all steps, repeats included."""
    batch_size: int
    needs: StepNeeds | None
    """None without training, or where it could not be counted."""
    measured: StepTime | None
    """A step of one process on this machine's GPU; None without one."""
    artifact_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Shaped:
    """A model on the meta device, and what its stages have done to it that its shapes do not show."""

    model: Model
    is_cut: bool = False

    @property
    def artifact_bytes(self) -> int:
        """Bytes of its weights in an artifact, with the copy for open_clip that an uncut CLIP gets."""
        copies = 2 if self.model.task == "clip" and not self.is_cut and not self.model.quantization else 1
        return copies * bytes_of(self.model.module.state_dict().values())

    def exported_bytes(self) -> int:
        """Return about how many bytes its ONNX files have: 4 per parameter, or 1 where INT8 applies."""
        numbers = bytes_of(self.model.module.parameters())
        if self.model.quantization:
            modules = dict(self.model.module.named_modules())
            rounded = [modules[name].weight for name in self.model.quantization["modules"]]
            table = anatomy.token_table(self.model.module) if anatomy.is_clip(self.model.module) else None
            rounded += [] if table is None else [table.weight]
            numbers -= sum(3 * weight.numel() for weight in rounded)
        return numbers


@dataclass(frozen=True)
class CompressForecast:
    """All stages of a recipe."""

    teachers: tuple[TeacherForecast, ...]
    stages: tuple[StageForecast, ...]
    models: Mapping[str, Shaped]
    """By artifact."""


def forecast_stages(plan: CompressPlan, processes: int = 1) -> CompressForecast:
    """Forecast every stage of a recipe on so many processes. Raises what running it would raise for a mistake in it."""
    task, taught = task_named(plan.recipe.task), [_teacher(spec, plan, processes) for spec in plan.teachers]
    teachers = tuple(shaped.model for _, shaped in taught)
    models = {"teacher": taught[0][1]} if taught else {}
    student = taught[0][1] if plan.recipe.student is None else _student(plan, *teachers[:1])
    stages = []
    for stage in plan.stages:
        students.freeze(student.model.module, task.towers_of_teacher(plan.recipe.student))
        found, student = _stage(stage, student, teachers, plan, processes)
        stages.append(found)
        models[stage.name] = student
    return CompressForecast(tuple(one for one, _ in taught), tuple(stages), models)


def _teacher(spec: TeacherSpec, plan: CompressPlan, processes: int) -> tuple[TeacherForecast, Shaped]:
    """Forecast a teacher from its header, its name or its recipe; no weights are read."""
    task, stages = task_named(plan.recipe.task), ()
    if spec.recipe is not None:
        inner = forecast_stages(compress_plan_from(checked(Recipe, spec.recipe, "teacher.recipe")), processes)
        name, shaped, stages = spec.recipe["name"], inner.models[inner.stages[-1].name], inner.stages
    elif spec.artifact is not None:
        name, shaped = str(spec.artifact), Shaped(_model_of_header(read_header(spec.artifact)), is_cut=True)
    else:
        name, known = spec.model, local_folder(spec.model) is not None or spec.checkpoint is None
        checkpoint = spec.checkpoint if known else "random"
        shaped = Shaped(_on_meta(lambda: task.load_pretrained(spec.model, checkpoint, "teacher")))
    size = None if spec.cache is None else _cache_bytes(shaped.model, spec.cache, plan)
    return TeacherForecast(name, _count(shaped.model.module), size, stages), shaped


def _student(plan: CompressPlan, teacher: Model | None = None) -> Shaped:
    """Return the student that the first stage starts from."""
    section, task = students.without_weights(plan.recipe.student), task_named(plan.recipe.task)
    inherits = "inherit" in section
    if inherits:  # what is inherited is chosen by weights, so there are some: zeros
        teacher = replace(teacher, module=copy.deepcopy(teacher.module).to_empty(device="cpu"))
        for tensor in (*teacher.module.parameters(), *teacher.module.buffers()):
            tensor.detach().zero_()
        model = task.student_from(section, teacher, plan.recipe.seed)
        return Shaped(_on_meta(lambda: model), is_cut=True)
    return Shaped(_on_meta(lambda: task.student_from(section, teacher, plan.recipe.seed)))


def _on_meta(make: Callable[[], Model]) -> Model:
    """Return the model that `make` makes, on the meta device; weights that it reads are dropped."""
    with torch.device("meta"):
        model = make()
    return replace(model, module=model.module.to("meta"))


def _model_of_header(header: Mapping[str, Any]) -> Model:
    """Return the model of an artifact's header."""
    task = task_named(header.get("task", "clip"))
    with torch.device("meta"):
        module = surgery.reshape(task.build(header["architecture"]), header["shapes"])
    preprocess = Preprocess.model_validate(header["preprocess"])
    more = {key: header.get(key) for key in ("tokenizer", "sparsity", "quantization")}
    return Model(module, header["architecture"], preprocess, **more, task=task.name)


def _stage(
    stage: Stage, student: Shaped, teachers: Sequence[Model], plan: CompressPlan, processes: int
) -> tuple[StageForecast, Shaped]:
    """Forecast a stage; return the student after it too."""
    settings, before, notes = stage.settings, student.model, []
    model = before
    if isinstance(settings, Sparsify):
        model = replace(model, sparsity={"weights": two_of_four_names(model.module)})
    if isinstance(settings, Quantize):
        names = quantizers.quantizable(model.module, tuple(name for name in settings.exclude if name != AUTO))
        model = replace(model, quantization={"modules": names, "portable": settings.portable})
        if AUTO in settings.exclude:
            notes.append("exclude: auto may keep layers in full precision")
    steps, needs, measured = _steps(settings, plan), None, None
    try:
        shown = _with_quantizers(model) if steps and model.quantization else model
        needs = _needs(stage, shown, teachers, plan, processes) if steps else None
        if steps and accelerator_of(plan.runtime) == "cuda":
            measured = _time(stage, shown, teachers, plan, processes)
    except torch.cuda.OutOfMemoryError:
        notes.append("a step does not fit into this GPU's memory")
    except RuntimeError as error:  # a library may require values, which shapes do not have
        notes.append(f"its memory could not be counted: {first_line(error)}")
    after = replace(student, model=model)
    if isinstance(settings, Prune):
        after, notes = _after_pruning(settings, after, notes)
    batch = getattr(settings, "batch_size", 0)
    return StageForecast(
        name=stage.name,
        kind=stage.kind,
        params=_count(before.module),
        params_after=_count(after.model.module),
        steps=steps,
        pairs=steps * batch,
        batch_size=batch,
        needs=needs,
        measured=measured,
        artifact_bytes=after.artifact_bytes,
        notes=tuple(notes),
    ), after


def _steps(settings: Any, plan: CompressPlan) -> int:
    """Return the training steps of a stage."""
    is_trained = isinstance(settings, Training) and settings.steps != 0 and (settings.steps or settings.epochs)
    return steps_of(settings, plan.data) if is_trained else 0


def _needs(stage: Stage, model: Model, teachers: Sequence[Model], plan: CompressPlan, processes: int) -> StepNeeds:
    """Count what a step of a stage needs."""
    with shapes_only():
        return step_needs(_rehearsal(stage, model, teachers, plan, PlannedFabric(plan.runtime, processes), shapes_of))


def _time(stage: Stage, model: Model, teachers: Sequence[Model], plan: CompressPlan, processes: int) -> StepTime:
    """Time a step of one process on this machine's GPU."""
    planned, fabric = PlannedFabric(plan.runtime, processes), start_fabric(plan.runtime)
    found = _rehearsal(stage, model, teachers, plan, planned, random_values_of)
    return timed_step(replace(found, context=replace(found.context, fabric=fabric)))


def _rehearsal(
    stage: Stage,
    model: Model,
    teachers: Sequence[Model],
    plan: CompressPlan,
    fabric: PlannedFabric,
    fill: Callable[[Model], Model],
) -> Rehearsal:
    settings = stage.settings
    lists = [getattr(settings, name, ()) for name in ("losses", "distill_losses")]
    terms = {name: term for losses in lists for name, term in terms_from(losses, stage.name).items()}
    scale = SimpleNamespace(manifest=SimpleNamespace(logit_scale=1.0))
    cached = bool(plan.teachers) and plan.teachers[0].cache is not None
    context = Context(
        fabric,
        plan.data,
        plan.recipe.seed,
        tuple(fill(teacher) for teacher in teachers),
        plan.runtime,
        caches=((scale,) * len(teachers),) if cached else (),
        title=stage.name,
    )
    student = fill(model)
    arrays = _batch(student, settings, terms, context)
    gates = (CRITERIA[settings.criterion].space, settings.sites) if isinstance(settings, Prune) else None
    return Rehearsal(student, settings, terms, context, arrays, gates)


def _with_quantizers(model: Model) -> Model:
    """Return a copy of a model on the meta device with quantizers on the modules that its `quantization` names."""
    module, scales = copy.deepcopy(model.module), {}
    for name in model.quantization["modules"]:
        weight = module.get_submodule(name).weight
        scales[f"{name}.input_quantizer._amax"] = weight.new_empty(())
        scales[f"{name}.weight_quantizer._amax"] = weight.new_empty(len(weight), *[1] * (weight.ndim - 1))
    quantizers.restore(module, model.quantization, scales)
    return replace(model, module=module)


def _batch(student: Model, config: Training, terms: Mapping[str, Loss.Settings], context: Context) -> dict[str, Tensor]:
    """Return the shapes of one process's first batch, see `TrainingSet`. Texts are as long as the longest of its texts."""
    sources, weights = context.sources(), [spec.weight for spec in context.data.train]
    world = context.fabric.world_size
    (draws,) = Batches([len(one) for one in sources], weights, config.batch_size, 1, context.seed, world=world)
    running = () if context.caches else context.teachers
    others, tokenize = [teacher.preprocess for teacher in running], student.tokenize()
    data = TrainingSet(sources, student.preprocess, tokenize, context.data.augment, context.seed, of_teachers=others)
    rows, size = len(draws), student.preprocess.size
    arrays = {name: torch.zeros(rows, dtype=torch.int64) for name in ("group", "label")}
    if data.has_images:
        arrays |= {name: torch.zeros(rows, 3, form.size, form.size) for name, form in data.forms.items()}
    if data.has_masks:
        arrays["mask"] = torch.zeros(rows, size, size, dtype=torch.uint8)

    def ids(count: int, texts: Sequence[str]) -> Tensor:
        whole = tokenize(list(dict.fromkeys(texts)))
        known = whole if "tokens" in needs_of(terms) else without_padding(whole, text_ends(student, running))
        return torch.zeros(count, known.shape[1], dtype=torch.int64)

    if data.has_texts:
        read = [readable_captions(sources[one.source], one.index) for one in draws[:TEXTS]]
        arrays["ids"] = ids(rows, [text for texts in read for text in texts])
    if data.has_answers:
        answers = [sources[one.source].answer_weights(one.index) for one in draws]
        count = sum(map(len, answers))
        arrays["answers"] = ids(count, [text for one in answers[:TEXTS] for text in one])
        arrays |= {"answer_weight": torch.zeros(count), "owner": torch.zeros(count, dtype=torch.int64)}
    for number, teacher in enumerate(context.teachers if context.caches else ()):
        for side in ("image",) * data.has_images + ("text",) * data.has_texts:
            arrays[f"teacher_{side}_{number}"] = torch.zeros(rows, _width(teacher))
            arrays[f"teacher_{side}_norm_{number}"] = torch.zeros(rows)
    return arrays


def _after_pruning(settings: Prune, student: Shaped, notes: list[str]) -> tuple[Shaped, list[str]]:
    """Cut a student's shapes as a search would that finds all units of equal worth."""
    if settings.vocabulary is not None:
        notes = [*notes, "the token embedding is counted before tokens are removed from it"]
    if settings.budget is None:
        return replace(student, is_cut=True), notes
    module = copy.deepcopy(student.model.module)
    if convnets.is_convnet(module):
        notes = [*notes, "the convolutional tower is counted before channels are cut"]
    gates = Gates(module, CRITERIA[settings.criterion].space, settings.sites)
    for group in groups_of(student.model, gates.sites, settings.budget):
        members = [gates.sites[index] for index in group.members]
        worth = [torch.linspace(1, 0, site.units).repeat(site.groups, 1) for site in members]
        rules = {"align": settings.align, "min_keep": settings.min_keep, "per_cost": False}
        for site, mask in zip(members, keep_masks(members, worth, group.costs, group.target, **rules), strict=True):
            site.mask = mask.float()
    for site in gates.sites:
        site.mask = torch.ones(site.groups, site.units) if site.mask.is_meta else site.mask
    shapes = surgery.shapes(module)
    cut = {part.name: surgery.shape_after(part, mask) for part, mask in gates.part_masks()}
    gates.remove()
    with torch.device("meta"):
        module = surgery.reshape(module, shapes | cut)
    return Shaped(replace(student.model, module=module), is_cut=True), notes


def _cache_bytes(teacher: Model, settings: CacheSettings, plan: CompressPlan) -> int:
    """Return the bytes of a teacher's embeddings of the training data, if no two captions are the same."""
    total, row = 0, 2 * _width(teacher) + 4
    for spec in plan.data.train:
        source = open_source(spec)
        views = len(source) * settings.views if source.has_images else 0
        captions = num_captions(spec) if source.has_texts and teacher.tokenizer is not None else 0
        total += views * (row + VIEW_BYTES) + captions * (row + CAPTION_BYTES) + len(source) * ITEM_BYTES
    return total


def _width(model: Model) -> int:
    """Return the width of what a teacher's cache has a row of: its embeddings, or a classifier's logits."""
    task = task_named(model.task)
    return task.graphs(model)[task.main_graph].outputs[0].shape[0]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
