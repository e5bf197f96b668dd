"""PyTorch, eager: on a GPU if there is one, else on the CPU. Inputs and outputs stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipress.artifact import WEIGHTS
from clipress.bench.latency import Enqueued
from clipress.bench.runners import RUNNERS, Loaded, Options, Runner
from clipress.errors import RecipeError
from clipress.models.load import Model
from clipress.runtime.graph import Arrays, Run
from clipress.tasks import model_from_artifact, task_named

Forward = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
SIMULATED = "int8 simulated"


@RUNNERS.register("torch")
class TorchRunner(Runner):
    """The graphs of one artifact. INT8 is simulated, as in training: the same outputs, but not faster.

    Args:
        artifact: folder with clipress.json and the weights.
        threads: inside one operator, on the CPU.
        dtype: fp32, or bf16 on a GPU.
        use_sparse_kernels: run 2:4 weights with semi-structured kernels, on a GPU in bf16.
    """

    backend = "torch"

    def __init__(self, artifact: Path, threads: int, dtype: str = "fp32", use_sparse_kernels: bool = False) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        _check_kernels(self._device, dtype, use_sparse_kernels)
        torch.set_num_threads(threads)
        model = model_from_artifact(artifact)
        self._task = task_named(model.task)
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._module = model.module.eval().to(self._device, self.dtype)
        self.model = Loaded(
            task=model.task,
            graphs=self._task.graphs(model),
            precision=use_kernels(self._module, model, dtype, use_sparse_kernels),
            preprocess=model.preprocess,
            tokenize=model.tokenize,
            bytes=(artifact / WEIGHTS).stat().st_size,
            parity={},
        )

    @classmethod
    def open(cls, artifact: Path, export: Path, options: Options) -> TorchRunner:
        return cls(artifact, options.threads, options.dtype, options.use_sparse_kernels)

    def run(self, graph: str) -> Run:
        forward = self.forward(graph)

        def run(inputs: Arrays) -> dict[str, Any]:
            with torch.inference_mode():
                needed = self.model.graphs[graph].needed(inputs)
                return {name: rows.float().cpu().numpy() for name, rows in forward(self.tensors(needed)).items()}

        return run

    def query(self, graph: str, batch: int, ids: int = 0) -> Callable[[], Any]:
        """Return one inference on a fixed random batch that is on the device already."""
        return self.timed(self.forward(graph), self.tensors(self.model.graphs[graph].example(batch, ids)))

    def forward(self, graph: str) -> Forward:
        """Return a graph as a function of tensors."""
        return lambda inputs: self._task.call(self._module, graph, inputs)

    def tensors(self, inputs: Arrays) -> dict[str, Tensor]:
        """Move a graph's inputs to the device, in the model's dtype."""
        moved = {name: torch.from_numpy(rows).to(self._device) for name, rows in inputs.items()}
        return {name: rows.to(self.dtype) if rows.is_floating_point() else rows for name, rows in moved.items()}

    def timed(self, forward: Forward, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
        """Return one call as a query: on a GPU, enqueueing and waiting are apart."""

        def run() -> None:
            with torch.inference_mode():
                forward(inputs)

        return run if self._device.type == "cpu" else Enqueued(run, torch.cuda.synchronize)


def _check_kernels(device: torch.device, dtype: str, use_sparse_kernels: bool) -> None:
    if device.type == "cpu" and (dtype != "fp32" or use_sparse_kernels):
        what = "2:4 kernels" if use_sparse_kernels else dtype
        raise RecipeError(
            f"bench: {what} require a GPU, and torch {torch.__version__} found none. Leave --dtype and --sparse-kernels out."
        )
    if use_sparse_kernels and dtype != "bf16":
        raise RecipeError("bench: torch has 2:4 kernels in bf16 only, found fp32. Add --dtype bf16.")


def use_kernels(module: nn.Module, model: Model, dtype: str, use_sparse_kernels: bool) -> str:
    """Switch 2:4 kernels on where they are wanted. Returns the precision that the model then has, in words."""
    if model.quantization:
        return SIMULATED
    if use_sparse_kernels and model.sparsity:
        weights = model.sparsity["weights"]
        return f"bf16, 2:4 in {convert_to_sparse_kernels(module, weights)} of {len(weights)}"
    return dtype


def convert_to_sparse_kernels(model: nn.Module, names: list[str]) -> int:
    """Convert 2:4 weights to sparse tensor core kernels, in place; shapes that torch rejects stay dense.

    Returns how many were accepted.
    """
    from torch.sparse import to_sparse_semi_structured

    used = 0
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Linear):
            continue
        try:
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
        except (RuntimeError, ValueError):
            continue
        used += 1
    return used
