"""PyTorch, eager: on a GPU where there is one, else on the CPU. Inputs and outputs stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipress.artifact import WEIGHTS
from clipress.bench.latency import Enqueued
from clipress.bench.runners import Loaded, input_shape, noise
from clipress.errors import RecipeError
from clipress.runtime.export_folder import Tokenizer
from clipress.tasks import model_from_artifact


class TorchRunner:
    """The two towers of one artefact. INT8 is simulated, as in training: right answers, no speed.

    Args:
        artifact: folder with clipress.json and the weights.
        threads: inside one operator, on the CPU.
        dtype: fp32, or bf16 on a GPU.
        two_four: run 2:4 weights with semi-structured kernels, on a GPU in bf16.
    """

    backend = "torch"

    def __init__(self, artifact: Path, threads: int, dtype: str = "fp32", two_four: bool = False) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        if self._device.type == "cpu" and (dtype != "fp32" or two_four):
            asked = "2:4 kernels were" if two_four else f"{dtype} was"
            raise RecipeError(f"{asked} asked for; they need a GPU, and torch {torch.__version__} finds none.")
        if two_four and dtype != "bf16":
            raise RecipeError("2:4 kernels were asked for in fp32; torch has them in bf16: add --dtype bf16.")
        torch.set_num_threads(threads)
        model = model_from_artifact(artifact)
        self._model = model.module.eval().to(self._device)
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._model.to(self._dtype)
        precision = "int8 simulated" if model.quantization else dtype
        if two_four and model.sparsity and not model.quantization:
            used = use_two_four_kernels(self._model, model.sparsity["weights"])
            precision = f"bf16, 2:4 in {used} of {len(model.sparsity['weights'])}"
        self.exported = Loaded(
            precision,
            model.preprocess,
            Tokenizer(**model.tokenizer),
            (artifact / WEIGHTS).stat().st_size,
            {},
        )

    def encode(self, tower: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from one batch of inputs to embeddings [B, D]."""
        forward = self._forward(tower)

        def encode(batch: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return forward(self._inputs(batch)).float().cpu().numpy()

        return encode

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one inference on a fixed batch of noise that is on the device already."""
        return self._timed(
            self._forward(tower), self._inputs(noise(tower, (batch, *input_shape(self.exported, tower))))
        )

    def _forward(self, tower: str) -> Callable[[Tensor], Tensor]:
        encode = self._model.encode_image if tower == "image" else self._model.encode_text
        return lambda inputs: encode(inputs, normalize=True)

    def _inputs(self, batch: np.ndarray) -> Tensor:
        inputs = torch.from_numpy(batch).to(self._device)
        return inputs.to(self._dtype) if inputs.is_floating_point() else inputs

    def _timed(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                forward(inputs)

        return run if self._device.type == "cpu" else Enqueued(run, torch.cuda.synchronize)


def use_two_four_kernels(model: nn.Module, names: list[str]) -> int:
    """Let 2:4 weights run on sparse tensor cores, in place; those whose shape torch refuses stay dense.

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
