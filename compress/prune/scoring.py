"""Score units on calibration batches: a search that trains nothing, so no optimizer is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipress.compress.context import Context
from clipress.compress.fabric import all_true
from clipress.compress.hook import Hook
from clipress.compress.loader import batches
from clipress.compress.loss_pass import LossPass
from clipress.compress.losses import Loss
from clipress.compress.settings import Training
from clipress.models import convnets
from clipress.models.load import Model
from clipress.progress import track


def score_units(
    settings: Training,
    model: Model,
    terms: Mapping[str, Loss.Settings],
    context: Context,
    hooks: Sequence[Hook],
    steps: int,
) -> dict[str, Any]:
    """Run the hooks of a search on `steps` batches, with the gradients of the losses if there are any.

    Weights do not change and need no gradients, unless the criterion scores channels of a convolutional tower with them.
    Returns the same details as training.
    """
    module = model.module.eval()
    losses = LossPass(model, settings, terms, context) if terms else None
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(convnets.is_convnet(module))
    skipped, finite = 0, torch.ones((), dtype=torch.bool, device=context.fabric.device)
    for step, arrays in enumerate(track(batches(model, settings, context, steps), steps, context.title, "batch")):
        arrays = {name: a for name, a in arrays.items() if isinstance(a, Tensor)}
        for hook in hooks:
            hook.before(step, arrays)
        if losses is not None and not _backward(losses, arrays, step):
            skipped += 1
            module.zero_grad(set_to_none=True)
            continue
        for hook in hooks:
            hook.after_part(step, finite)
            hook.after_backward(step)
            hook.after_update(step)
        module.zero_grad(set_to_none=True)
    if losses is not None:
        losses.close()
    for parameter in trained:
        parameter.requires_grad_(True)
    return {"steps": 0, "batches": steps, "skipped_steps": skipped}


def _backward(losses: LossPass, arrays: dict[str, Tensor], step: int) -> bool:
    """Compute the gradients of a batch. Returns whether the loss is finite on every process."""
    with losses.fabric.autocast():
        outputs = losses.encoder(**losses.inputs(step, arrays))
    total, _ = losses.loss(outputs, arrays, step)
    if not all_true(bool(torch.isfinite(total)), losses.fabric):
        return False
    total.backward()
    return True
