"""Cut what a search has chosen, and refit what remains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from clipress.compress.calibration import Calibration, StoredSamples
from clipress.compress.context import Context
from clipress.compress.fabric import Reduce
from clipress.compress.prune.refit import cut_and_refit
from clipress.compress.prune.settings import Prune
from clipress.compress.stage import Details
from clipress.models import anatomy, surgery
from clipress.models.anatomy import Part
from clipress.models.load import Model


def cut_parts(
    settings: Prune, model: Model, context: Context, masks: Mapping[str, surgery.Mask], reduce: Reduce
) -> Details:
    """Cut every part, and refit what remains if the settings say so."""
    generator = torch.Generator().manual_seed(context.seed)

    def cut(part: Part) -> None:
        if part.name in masks:
            surgery.cut(part, masks[part.name])
            if settings.in_tower("qkv_biases", part.tower) == "lost":
                surgery.lose_biases(part, generator)
            if settings.in_tower("softmax_scale", part.tower) == "sqrt_k":
                surgery.rescale(part)

    refit, blocks = settings.refit, anatomy.blocks(model.module)
    towers = dict.fromkeys(block.tower for block in blocks if any(part.name in masks for part in block.parts))
    refitted = []
    with TemporaryDirectory() as folder:
        batches = Calibration(model, settings, context, refit.samples) if refit and towers else ()
        samples = StoredSamples(batches, Path(folder), context.fabric.device)
        for tower in towers:
            own = [block for block in blocks if block.tower == tower]
            if refit and not all(block.is_residual for block in own):
                context.say(
                    f"{context.title}: the {tower} tower was not refitted: what its parts write is normalised, or the stream "
                    "changes its shape, before the next block reads it"
                )
            elif refit:
                if cut_and_refit(own, model, samples, cut, refit, reduce):
                    refitted.append(tower)
                    continue
                context.say(
                    f"{context.title}: the {tower} tower was not refitted, the training data has no samples for it"
                )
            for block in own:
                for part in block.parts:
                    cut(part)
    return {"refitted": refitted} if refit else {}
