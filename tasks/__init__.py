"""What a model is for: how it is built, its graphs, how it learns, how it is measured. One file per task.

Everything else loops over a task's graphs (functions that are exported, see runtime/graph.py) and its model's parts
(what may be cut, see models/anatomy.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from clipress.artifact import Artifact, load_artifact
from clipress.errors import ArtifactError, nearest
from clipress.models.load import Model, rebuild
from clipress.registry import Registry
from clipress.runtime.graph import Arrays, Graph, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clipress.data.eval_sets import EvalSet
    from clipress.data.transforms import Preprocess
    from clipress.metrics.outcomes import Outcomes
    from clipress.tasks.training import Lesson, TrainingJob

Tokenize = Callable[[Sequence[str]], Any]


class Task(ABC):
    """What a model is for. A task is stateless; models and artifacts name theirs."""

    name: ClassVar[str]
    towers: ClassVar[tuple[str, ...]]
    """The groups of parts that settings, budgets and reports name."""
    main_graph: ClassVar[str]
    """The graph whose latency decides which artifact is kept."""
    figures: ClassVar[tuple[str, ...]]
    """Endings of the metrics in which `bench.max_accuracy_drop` looks for a loss."""

    provides: ClassVar[frozenset[str]]
    """What losses may need and this task has, of `losses.Loss.needs`."""

    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of stages, by kind, whose defaults are the task's own."""
    reads_text: ClassVar[bool] = False
    """Whether its models have a tokenizer."""

    @abstractmethod
    def build(self, architecture: dict[str, Any], seed: int | None = None) -> nn.Module:
        """Build a module from an artifact's architecture, with our attention in every block and random weights.

        Raises RecipeError or ArtifactError for an architecture that cannot be built; sizes are checked before memory is
        taken.
        """

    @abstractmethod
    def check_student(self, section: Mapping[str, Any], has_teacher: bool) -> None:
        """Check a recipe's `student` section before anything is done. Raises RecipeError."""

    @abstractmethod
    def student_from(self, section: Mapping[str, Any], teacher: Model | None, seed: int) -> Model:
        """Build the student of a recipe; its random weights depend on the seed alone."""

    @abstractmethod
    def load_pretrained(self, name: str, checkpoint: str | None, where: str) -> Model:
        """Load a model by its library's name, with weights from a file or a pretrained tag; `where` begins messages."""

    def towers_of_teacher(self, section: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Return the towers that a student takes from its teacher whole, and that no stage trains."""
        return ()

    @abstractmethod
    def graphs(self, model: Model) -> dict[str, Graph]:
        """Return the functions that are exported, by their names."""

    @abstractmethod
    def call(self, module: nn.Module, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute a graph's outputs, as they are exported."""

    @abstractmethod
    def inputs_of(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the inputs of every graph that a training batch has inputs for: graph -> input -> rows."""

    @abstractmethod
    def samples(self, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None) -> dict[str, Arrays]:
        """Return real inputs of every graph, at most `SAMPLES` images per set: what implementations are compared on."""

    @abstractmethod
    def evaluate(
        self, run: Mapping[str, Run], sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Tokenize | None
    ) -> dict[str, Outcomes]:
        """Measure accuracy through callables, one per graph, whatever they run on: `{"<set>/<metric>": outcomes}`."""

    def needs(self, of_losses: frozenset[str]) -> frozenset[str]:
        """Return what a stage's losses need, with what the task needs to serve them."""
        return of_losses

    @abstractmethod
    def lesson(self, job: TrainingJob) -> Lesson:
        """Return how a model learns in one stage: its forward pass and the batch that losses read."""

    def describe(self, model: Model) -> dict[str, Any]:
        """Return what a task alone knows of an exported model, for export.json and the files' metadata."""
        return {}

    def save_for_library(self, model: Model, folder: Path) -> bool:
        """Write a model that was not cut in the format of the library it comes from; False where there is none."""
        return False


TASKS: Registry[type[Task]] = Registry("task", "clipress.tasks")
SAMPLES = 128  # images per evaluation set, with their captions


def task_named(name: str) -> Task:
    """Return a task by the name that an artifact or export holds. Raises ArtifactError for an unknown one."""
    if name not in TASKS:
        raise ArtifactError(f"Unknown task '{name}': this clipress cannot use the model.{nearest(name, TASKS)}")
    return TASKS[name]()


def model_from_artifact(source: Artifact | str | Path) -> Model:
    """Rebuild a model from nothing but its artifact; outputs are bitwise those it was saved with."""
    artifact = source if isinstance(source, Artifact) else load_artifact(source)
    task = task_named(artifact.task)
    if task.reads_text and artifact.tokenizer is None:
        raise ArtifactError(f"The artifact has no tokenizer, which a model of task {task.name} needs.")
    return rebuild(artifact, task.build)


def graphs_of(model: Model) -> dict[str, Graph]:
    """Return a model's graphs, by their names."""
    return task_named(model.task).graphs(model)


def runs_of(model: Model) -> dict[str, Run]:
    """Return a model's graphs as functions from arrays to arrays, in torch and in evaluation mode."""
    import torch

    task, device = task_named(model.task), next(model.module.parameters()).device

    def runner(graph: str) -> Run:
        def run(inputs: Arrays) -> dict[str, Any]:
            model.module.eval()
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(rows).to(device) for name, rows in inputs.items()}
                return {name: y.float().cpu().numpy() for name, y in task.call(model.module, graph, tensors).items()}

        return run

    return {graph: runner(graph) for graph in task.graphs(model)}


def evaluate_model(model: Model, sets: Sequence[EvalSet]) -> dict[str, Outcomes]:
    """Measure a model's accuracy in torch: `{"<set>/<metric>": outcomes}`."""
    return task_named(model.task).evaluate(runs_of(model), sets, model.preprocess, model.tokenize())
