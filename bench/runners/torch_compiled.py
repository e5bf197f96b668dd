"""PyTorch through torch.compile: one compilation per graph and batch, checked against eager before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from clipress.bench.runners import RUNNERS
from clipress.bench.runners.torch import SIMULATED, TorchRunner
from clipress.errors import ExportError, RecipeError, first_line

LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99}


@RUNNERS.register("torch-compiled")
class TorchCompiledRunner(TorchRunner):
    """The eager runner, which also measures accuracy; only what is timed is compiled.

    INT8 stays eager: it is simulated by modelopt's modules, which torch.compile cannot trace or breaks into pieces.
    """

    backend = "torch-compiled"

    def query(self, graph: str, batch: int, ids: int = 0) -> Callable[[], Any]:
        """Return one inference on a fixed random batch that is on the device already, compiled unless INT8 is simulated."""
        if self.model.precision == SIMULATED:
            return super().query(graph, batch, ids)
        eager = self.forward(graph)
        # On a GPU as one CUDA graph: at small batches launching the kernels takes longer than running them.
        mode = "reduce-overhead" if self._device.type == "cuda" else None
        compiled = torch.compile(eager, dynamic=False, mode=mode)
        inputs = self.tensors(self.model.graphs[graph].example(batch, ids))
        with torch.inference_mode():
            try:
                found = compiled(inputs)
            except RuntimeError as error:  # the base of everything that the compiler raises
                raise RecipeError(
                    f"torch.compile failed on graph '{graph}': {first_line(error)} "
                    "On a CPU it requires a C++ compiler. Leave --runner torch-compiled out."
                ) from None
            expected = eager(inputs)
        least = min(
            float(cosine_similarity(found[name].float().flatten(1), rows.float().flatten(1)).min())
            for name, rows in expected.items()
        )
        limit = LEAST_COSINE[self.dtype]
        if not least >= limit:
            raise ExportError(
                f"The compiled graph '{graph}' does not agree with eager torch: expected a cosine of "
                f"{limit} or more, found {least:.6f}. Leave --runner torch-compiled out."
            )
        return self.timed(compiled, inputs)
