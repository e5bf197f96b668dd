"""PyTorch through torch.compile: one compilation per tower and batch, held against eager before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from clipress.bench.runners import input_shape, noise
from clipress.bench.runners.torch import TorchRunner
from clipress.errors import ExportError, RecipeError

LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99}


class TorchCompiledRunner(TorchRunner):
    """Like the eager one, whose embeddings it gives where accuracy is measured; only what is timed is compiled."""

    backend = "torch-compiled"

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one compiled inference on a fixed batch of noise that is on the device already."""
        eager = self._forward(tower)
        compiled = torch.compile(eager, dynamic=False)
        inputs = self._inputs(noise(tower, (batch, *input_shape(self.exported, tower))))
        with torch.inference_mode():
            try:
                found = compiled(inputs)
            except RuntimeError as error:  # what the compiler raises has this type in common
                raise RecipeError(
                    f"torch.compile failed on the {tower} tower: {str(error).strip().splitlines()[0]} "
                    "It needs a C++ compiler on a CPU; leave --runner torch-compiled out."
                ) from None
            least = float(cosine_similarity(found.float(), eager(inputs).float()).min())
        if not least >= LEAST_COSINE[self._dtype]:
            raise ExportError(f"The compiled {tower} tower does not agree with eager torch: least cosine {least:.6f}.")
        return self._timed(compiled, inputs)
