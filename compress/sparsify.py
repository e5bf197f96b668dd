"""The `sparsify` stage: 2:4 sparsity, two zeros in every four weights along the input axis (nvidia-modelopt).

The zeros are written into plain weights immediately and kept by later training (`train.HoldZeros`), so they survive
fine-tuning, saving, INT8 and export without special modules.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipress.compress.calibration import Calibration
from clipress.compress.context import Context
from clipress.compress.losses import Losses, terms_from
from clipress.compress.names import MAKES
from clipress.compress.settings import Training
from clipress.compress.stage import stage
from clipress.compress.train import train
from clipress.models.load import Model

KINDS = (nn.Linear, nn.Conv2d)
ROWS, COLUMNS = 8, 16  # Sparse tensor cores require multiples of these.
PROJECTIONS = ("proj", "text_projection")  # open_clip's transformers store these matrices as bare parameters


class Sparsify(Training):
    """Settings of `sparsify`."""

    pattern: Literal["2:4"] = "2:4"
    method: Literal["magnitude", "sparsegpt"] = "magnitude"
    """How the zeros are chosen. `sparsegpt` also adjusts the remaining weights of every Linear that the calibration samples
    reach, to compensate for the zeros; all other layers use magnitude."""
    calibrate: int = Field(128, ge=1)
    """Number of training items used by `method: sparsegpt`."""
    losses: Losses = ("contrastive", "affinity", "feature", "interactive")
    """Losses of the fine-tuning that follows."""
    steps: int | None = Field(None, ge=0)
    """Steps of the fine-tuning; 0 leaves it out."""
    lr: float = Field(1e-4, ge=0)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        terms_from(self.losses, "sparsify.losses")


@stage(
    "sparsify",
    Sparsify,
    makes=MAKES["sparsify"],
    never_after={
        "quantize": "the INT8 scales were calibrated for the dense weights",
        "sparsify": "the weights already have the pattern",
    },
)
def run(settings: Sparsify, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Zero two of every four weights, then fine-tune the others."""
    show = None
    if settings.method == "sparsegpt":
        model.module.to(context.fabric.device)
        show = Calibration(model, settings, context, settings.calibrate)
    report = zero_two_of_four(model.module, show)
    for line in report_lines(report):
        context.say(f"{context.title}: {line}")
    if show:  # processes calibrate on different samples, so the first one's weights are used everywhere
        model.module.load_state_dict(context.fabric.broadcast(model.module.state_dict()))
    sparsity = {"pattern": settings.pattern, "method": settings.method, **dataclasses.asdict(report)}
    sparse = dataclasses.replace(model, sparsity=sparsity)
    details: dict[str, Any] = {"steps": 0}
    if settings.steps != 0:
        details = train(sparse, settings, terms_from(settings.losses, "sparsify.losses"), context)
    kept = {"skipped": report.skipped, "by_magnitude": report.by_magnitude}
    return sparse, details | {"sparse_weights": len(report.weights), **kept}


@dataclass(frozen=True)
class SparsityReport:
    """Which weights became 2:4 sparse, and which did not."""

    weights: list[str]
    """Names of the 2:4 sparse weights."""
    skipped: dict[str, str]
    """Every other Linear, Conv or bare projection, with the reason why it stays dense."""
    by_magnitude: list[str]
    """Those of `weights` whose zeros were chosen by magnitude although the method is SparseGPT."""


def report_lines(report: SparsityReport) -> list[str]:
    """Return a summary line, and one line with the reason for each layer that stays dense."""
    by = f", {len(report.by_magnitude)} of them by magnitude" if report.by_magnitude else ""
    left = [f"{name} stays dense: {reason}" for name, reason in report.skipped.items()]
    return [f"2:4 in {len(report.weights)} weights{by}", *left]


def zero_two_of_four(model: nn.Module, show: Callable[[nn.Module], None] | None = None) -> SparsityReport:
    """Write 2:4 zeros into every trainable layer whose shape allows it, in place.

    The two smallest of four become zero, or SparseGPT's choice with `show`, which runs calibration samples.
    """
    import modelopt.torch.sparsity as mts

    from clipress.compress import sparsegpt

    layers = {name: m for name, m in model.named_modules() if isinstance(m, KINDS) and m.weight.numel()}
    held = {name: m.weight.detach().clone() for name, m in layers.items() if not m.weight.requires_grad}
    unseen: list[str] = []
    with redirect_stdout(io.StringIO()):  # modelopt prints every layer
        if show:
            unseen = sparsegpt.sparsify(model, show)
        else:
            mts.sparsify(model, "sparse_magnitude")
        mts.export(model)
    # The zeros are the only record needed; modelopt's state would otherwise stay attached to the model.
    if hasattr(model, "_modelopt_state"):
        del model._modelopt_state
    names, skipped = [], dict.fromkeys(held, "frozen, so it could not recover")
    for name, weight in held.items():
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    for name, layer in layers.items():
        if name in held:
            continue
        if is_two_of_four(layer.weight):
            names.append(f"{name}.weight")
        else:
            rows, columns = layer.weight.shape[:2]
            skipped[name] = f"{rows} x {columns}; 2:4 requires a multiple of {ROWS} x a multiple of {COLUMNS}"
    bare = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in PROJECTIONS]
    skipped |= dict.fromkeys(bare, "a bare parameter; only layers become 2:4")
    return SparsityReport(names, skipped, [f"{name}.weight" for name in unseen if f"{name}.weight" in names])


def two_of_four_names(model: nn.Module) -> list[str]:
    """Return the weights that `zero_two_of_four` would make 2:4, by their shapes and by what is trained."""
    layers = [(name, m.weight) for name, m in model.named_modules() if isinstance(m, KINDS) and m.weight.numel()]
    return [
        f"{name}.weight"
        for name, weight in layers
        if weight.requires_grad and not weight.shape[0] % ROWS and not weight.shape[1] % COLUMNS
    ]


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether every four weights along the input axis of [out, in, ...] have at least two zeros."""
    if weight.shape[1] % 4:
        return False
    groups = weight.detach().movedim(1, -1).reshape(-1, 4)
    return bool(((groups == 0).sum(1) >= 2).all()) and bool(torch.isfinite(groups).all())
