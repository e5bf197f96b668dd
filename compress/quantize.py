"""The `quantize` stage: INT8 calibration on real samples, then quantization-aware training (nvidia-modelopt).

Calibration and training share one set of quantizers, so PTQ (`steps: 0`) and QAT cannot diverge.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from clipress.compress.bias_correction import correct_biases
from clipress.compress.calibration import Calibration, layers_reached
from clipress.compress.context import Context
from clipress.compress.fabric import all_reduce, all_sum
from clipress.compress.losses import Losses, terms_from
from clipress.compress.names import MAKES
from clipress.compress.sensitivity import first_samples, keep_sensitive, sensitivities
from clipress.compress.settings import Training
from clipress.compress.stage import stage
from clipress.compress.train import train
from clipress.models import quantizers
from clipress.models.load import Model

AUTO = "auto"


class Quantize(Training):
    """Settings of `quantize`."""

    dtype: Literal["int8"] = "int8"
    calibrate: int = Field(512, ge=1)
    """Number of training items used to set the activation scales."""
    method: quantizers.Method = "max"
    """How activation scales are chosen: `max` covers all observed values, the other methods clip outliers."""
    percentile: float = Field(99.9, gt=50, le=100)
    """Percentile of the absolute activations, for `method: percentile`."""
    portable: bool = True
    """Use 7-bit weights, which are exact on every CPU. 8-bit weights need a GPU or an x86 CPU with VNNI; on other CPUs
    ONNX Runtime has to run them in a slower mode."""
    exclude: Annotated[
        tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
    ] = ()
    """Name patterns of modules to leave in full precision; `auto` adds the most sensitive modules."""
    max_damage: float = Field(0.01, ge=1e-9, lt=2)
    """With `exclude: auto`: largest damage (1 - mean cosine) that rounding may do to each tower's embeddings before
    training."""
    sensitivity: bool = False
    """Measure the damage of every layer on its own and record it in the lineage; `exclude: auto` always does."""
    losses: Losses = ("affinity", "feature")
    steps: int | None = Field(None, ge=0)
    """Steps of quantization-aware training; 0 only calibrates."""
    correct_biases: bool = False
    """Subtract from every layer's bias the mean error of rounding, before any training."""
    lr: float = Field(2e-5, ge=0)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        terms_from(self.losses, "quantize.losses")


@stage("quantize", Quantize, makes=MAKES["quantize"], never_after={"quantize": "the model is already INT8"})
def run(settings: Quantize, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Calibrate, exclude sensitive layers if the settings say so, then train with rounding in the forward pass."""
    model.module.to(context.fabric.device)
    names = quantizers.quantizable(model.module, settings.exclude)
    reached = layers_reached(model, names)
    details: dict[str, Any] = {}
    if left := [name for name in names if name not in reached]:
        context.say(f"quantize: {len(left)} layers that nothing calls stay in full precision.")
        details["not_reached"] = left
    names = reached
    calibration = Calibration(model, settings, context, settings.calibrate)
    reduce = partial(all_reduce, fabric=context.fabric)
    quantizers.attach(model.module, names, calibration, settings.method, settings.percentile, settings.portable, reduce)
    if settings.sensitivity or AUTO in settings.exclude:
        details |= _sensitivity(settings, model, names, calibration, context)
        kept = details.get("kept", [])
        quantizers.detach(model.module, kept)
        names = [name for name in names if name not in kept]
        quantizers.only(model.module, names, names)
    quantization = {
        "dtype": settings.dtype,
        "modules": names,
        "exclude": list(settings.exclude),
        "calibrated_on": settings.calibrate,
        "method": settings.method,
        "portable": settings.portable,
    }
    quantized = Model(**{**model.__dict__, "quantization": quantization})
    details |= {"quantized_modules": len(names), "steps": 0}
    if settings.correct_biases:
        reduce = partial(all_sum, fabric=context.fabric)
        details["corrected_biases"] = correct_biases(model.module, names, calibration, reduce)
    if settings.steps != 0:
        details |= train(quantized, settings, terms_from(settings.losses, "quantize.losses"), context)
    return quantized, details


def _sensitivity(
    settings: Quantize, model: Model, names: list[str], calibration: Calibration, context: Context
) -> dict[str, Any]:
    """Measure sensitivities and, with `exclude: auto`, choose the modules to exclude, on the first process for all."""
    samples = first_samples(calibration)
    report = sensitivities(model, names, samples)
    details: dict[str, Any] = {"sensitivity": [asdict(layer) for layer in report]}
    if AUTO in settings.exclude:
        details["kept"], details["damage"] = keep_sensitive(model, report, samples, settings.max_damage)
    return context.fabric.broadcast(details)
