"""Tasks, one file each: how a kind of model is built, trained, exported and evaluated.

The rest of the code loops over a task's graphs (the exported functions, see runtime/graph.py) and its model's parts (the
units of pruning, see models/anatomy.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from clipress.artifact import Artifact, load_artifact
from clipress.errors import ArtifactError, ExportError, nearest
from clipress.models.load import Model, rebuild
from clipress.models.weights_file import Which
from clipress.registry import Registry
from clipress.runtime.graph import Arrays, Graph, Run

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from clipress.data.eval_sets import EvalSet
    from clipress.data.transforms import Preprocess
    from clipress.metrics.outcomes import Outcomes
    from clipress.tasks.training import Lesson, TrainingJob

Tokenize = Callable[[Sequence[str]], Any]


class Task(ABC):
    """Base class of tasks. Tasks are stateless; models and artifacts refer to them by name."""

    name: ClassVar[str]
    towers: ClassVar[tuple[str, ...]]
    """Groups of parts, as named in settings, budgets and reports."""
    main_graph: ClassVar[str]
    """The graph whose latency decides which artifact is selected."""
    figures: ClassVar[tuple[str, ...]]
    """Suffixes of the metrics that `bench.max_accuracy_drop` checks."""
    figures_unit: ClassVar[str] = "%"
    """The unit of those figures; empty for one that has none."""

    provides: ClassVar[frozenset[str]]
    """The requirements in `losses.Loss.needs` that this task can satisfy."""

    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Default settings by stage kind, if they differ from the stage's own."""
    mixes: ClassVar[bool] = False
    """Whether its training images may be mixed with each other (mixup, CutMix)."""
    reads_text: ClassVar[bool] = False
    """Whether its models have a tokenizer."""

    @abstractmethod
    def build(self, architecture: dict[str, Any], seed: int | None = None) -> nn.Module:
        """Build a module with random weights from an artifact's architecture, with our attention in every block.

        Raises RecipeError or ArtifactError for an invalid architecture; sizes are checked before memory is allocated.
        """

    @abstractmethod
    def check_student(self, section: Mapping[str, Any], has_teacher: bool) -> None:
        """Validate a recipe's `student` section before any work starts. Raises RecipeError."""

    @abstractmethod
    def student_from(self, section: Mapping[str, Any], teacher: Model | None, seed: int) -> Model:
        """Build the student of a recipe; random weights depend only on the seed."""

    @abstractmethod
    def load_pretrained(self, name: str, checkpoint: str | None, where: str, which: Which | None = None) -> Model:
        """Load a model by its name in the library, with weights from a file or a pretrained tag.

        `where` is the prefix of error messages; `which` chooses raw or averaged weights of a file.
        """

    def towers_of_teacher(self, section: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Return the towers that a student copies from its teacher and that no stage trains."""
        return ()

    @abstractmethod
    def graphs(self, model: Model) -> dict[str, Graph]:
        """Return the exported functions by name."""

    def graph_of(self, tower: str) -> str:
        """Return what runs a tower: a graph, or another name that `inputs_of` and `call` know."""
        return tower

    def graphs_of_tower(self, tower: str) -> tuple[str, ...]:
        """Return the graphs that make up a tower, whose costs are its own."""
        return (self.graph_of(tower),)

    @abstractmethod
    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs of a graph, as exported, or of another name in `inputs_of`."""

    @abstractmethod
    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what a training batch can feed: graph -> input -> rows.

        Where graphs read what others compute, a name of the task's own stands for the whole pass.
        """

    @abstractmethod
    def cached_rows(self, module: nn.Module, name: str, rows: Tensor) -> Tensor:
        """Return what a teacher's cache keeps of an array of a training batch, `pixels` or `ids`: raw rows [B, D]."""

    @abstractmethod
    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        """Return real inputs for every graph, at most `SAMPLES` images per set, to compare implementations on."""

    def completed(self, samples: Mapping[str, Arrays], run: Mapping[str, Run]) -> dict[str, Arrays]:
        """Return samples with the inputs that other graphs compute, which `run` does."""
        return dict(samples)

    @abstractmethod
    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        """Evaluate accuracy through one callable per graph, for any backend: `{"<set>/<metric>": outcomes}`."""

    def needs(self, of_losses: frozenset[str]) -> frozenset[str]:
        """Return the requirements of a stage's losses, plus what the task needs to satisfy them."""
        return of_losses

    @abstractmethod
    def lesson(self, job: TrainingJob) -> Lesson:
        """Return the lesson of one stage: the forward pass, and the batch that losses read."""

    def describe(self, model: Model) -> dict[str, Any]:
        """Return task-specific facts of an exported model, for export.json and the metadata of exported files."""
        return {}

    def save_for_library(self, model: Model, folder: Path) -> bool:
        """Write an uncut model in its library's format. Returns False if there is no such format."""
        return False


def default_losses(training: Sequence[str], quantize: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return `stage_defaults` for a task: the losses of stages that train, and those of quantization."""
    return {kind: {"losses": [*training]} for kind in ("distill", "prune", "sparsify")} | {
        "quantize": {"losses": [*quantize]}
    }


TASKS: Registry[type[Task]] = Registry("task", "clipress.tasks")
SAMPLES = 128  # images per evaluation set, with their captions


def sample_images(sets: Sequence[EvalSet], preprocess: Preprocess) -> list[np.ndarray]:
    """Return the first images of every evaluation set, float32 [<=SAMPLES, 3, S, S]. Raises ExportError without a set."""
    if not sets:
        raise ExportError("Parity checks require real samples. Add 'test', 'val' or 'train' data to the recipe.")
    return [next(one.pixel_batches(preprocess, SAMPLES)) for one in sets]


def sample_texts(sets: Sequence[EvalSet], images: Sequence[np.ndarray]) -> list[str]:
    """Return a text of each of `sample_images`. Raises RecipeError for a set without texts."""
    return [text for one, taken in zip(sets, images, strict=True) for text in one.first_texts(len(taken))]


def task_named(name: str) -> Task:
    """Return the task named by an artifact or export. Raises ArtifactError for an unknown name."""
    if name not in TASKS:
        raise ArtifactError(
            f"Unknown task '{name}': this version of clipress cannot use the model.{nearest(name, TASKS)}"
        )
    return TASKS[name]()


def model_from_artifact(source: Artifact | str | Path) -> Model:
    """Rebuild a model from its artifact; outputs are bitwise identical to those before saving."""
    artifact = source if isinstance(source, Artifact) else load_artifact(source)
    task = task_named(artifact.task)
    if task.reads_text and artifact.tokenizer is None:
        raise ArtifactError(f"The artifact has no tokenizer, which task {task.name} requires.")
    return rebuild(artifact, task.build)


def graphs_of(model: Model) -> dict[str, Graph]:
    """Return a model's graphs by name."""
    return task_named(model.task).graphs(model)


def runs_of(model: Model) -> dict[str, Run]:
    """Return a model's graphs as functions on NumPy arrays that run in torch, in evaluation mode."""
    import torch

    task, device = task_named(model.task), next(model.module.parameters()).device

    def runner(graph: Graph) -> Run:
        def run(inputs: Arrays) -> dict[str, Any]:
            model.module.eval()
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(rows).to(device) for name, rows in graph.needed(inputs).items()}
                outputs = task.call(model.module, graph.name, tensors)
                return {name: rows.float().cpu().numpy() for name, rows in outputs.items()}

        return run

    return {name: runner(graph) for name, graph in task.graphs(model).items()}


def evaluate_model(model: Model, sets: Sequence[EvalSet]) -> dict[str, Outcomes]:
    """Evaluate a model's accuracy in torch: `{"<set>/<metric>": outcomes}`."""
    runs, tokenize = runs_of(model), model.tokenize()
    return evaluated(model.task, runs, sets, model.preprocess, tokenize)


def evaluated(
    task: str, runs: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
) -> dict[str, Outcomes]:
    """Evaluate accuracy as `Task.evaluate` does, without the records that cannot be read."""
    from clipress.data.eval_sets import on_readable

    return on_readable(lambda readable: task_named(task).evaluate(runs, readable, preprocess, tokenize), sets)
