"""Calibration: training pairs shown to a model without gradients, and what they must be for that to mean anything."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clipress.compress.context import Context
from clipress.compress.settings import Training
from clipress.compress.train import batches
from clipress.errors import DataError
from clipress.models.load import Model

Samples = dict[str, Tensor]
"""Of a batch: `pixels` float32 [B, 3, S, S], `ids` int64 [B, L]; either may be missing."""


class Calibration:
    """The first `pairs` training pairs of a stage, rounded up to whole batches. Call it with a model to show them."""

    def __init__(self, model: Model, config: Training, context: Context, pairs: int) -> None:
        self.device, self.title = context.fabric.device, context.title
        self.loader = batches(model, config, context, -(-pairs // config.batch_size))

    def __iter__(self) -> Iterator[Samples]:
        """Yield `Samples`, on the model's device. Raises DataError when all pictures were one and the same."""
        first, varied, shown = None, False, 0
        for arrays in self.loader:
            samples: Samples = {name: arrays[name].to(self.device) for name in ("pixels", "ids") if name in arrays}
            shown += len(arrays["group"])
            if "pixels" in samples:
                first = samples["pixels"][0] if first is None else first
                varied = varied or bool((samples["pixels"] != first).any())
            yield samples
        if first is not None and shown > 1 and not varied:
            raise DataError(
                f"{self.title}: all {shown} calibration pictures are the same, and scales set on one picture fit no "
                "other. Give data.train different pictures."
            )

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """Run both towers on every sample."""
        model.eval()
        for samples in self:
            embeddings(model, samples)


def embeddings(model: nn.Module, samples: Samples) -> dict[str, Tensor]:
    """Return what each tower makes of its samples: rows [B, D], under `image` and `text`."""
    found = {}
    if "pixels" in samples:
        found["image"] = model.encode_image(samples["pixels"])
    if "ids" in samples:
        found["text"] = model.encode_text(samples["ids"])
    return found
