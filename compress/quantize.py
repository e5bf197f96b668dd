"""INT8: calibrate on real samples, then quantisation-aware training with the dense teacher (nvidia-modelopt).

Calibration and training share one set of quantisers, so PTQ (`steps: 0`) and QAT cannot drift apart.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from clipress.compress.calibration import Calibration
from clipress.compress.context import Context
from clipress.compress.losses import Losses, terms_from
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
    """Training pairs shown to set the activation scales."""
    method: quantizers.Method = "max"
    """What of the activations seen sets their scale; the other two cut off outliers."""
    percentile: float = Field(99.9, gt=50, le=100)
    """Of the absolute activations, with `method: percentile`."""
    portable: bool = True
    """Weights in 7 bits, exact on every CPU. In 8 bits they are for GPUs and for x86 CPUs with VNNI instructions; on others
    ONNX Runtime must run them in a slower mode."""
    exclude: Annotated[
        tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
    ] = ()
    """Name patterns of modules that stay in full precision; `auto` among them adds the most sensitive ones."""
    max_damage: float = Field(0.01, ge=1e-9, lt=2)
    """With `exclude: auto`: 1 - mean cosine that rounding may cost each tower's embeddings before any training."""
    sensitivity: bool = False
    """Measure what every layer alone costs and leave that in the lineage; `exclude: auto` does so anyway."""
    losses: Losses = ("affinity", "feature")
    steps: int | None = Field(None, ge=0)
    """Of quantisation-aware training; 0 calibrates only."""
    lr: float = Field(2e-5, ge=0)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        terms_from(self.losses, "quantize.losses")


@stage("quantize", Quantize, makes="int8", never_after={"quantize": "the model is INT8 already"})
def run(settings: Quantize, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Calibrate, leave sensitive layers out where asked, then train with the rounding in place."""
    names = quantizers.quantizable(model.module, settings.exclude)
    model.module.to(context.fabric.device)
    calibration = Calibration(model, settings, context, settings.calibrate)
    quantizers.attach(model.module, names, calibration, settings.method, settings.percentile, settings.portable)
    details: dict[str, Any] = {}
    if settings.sensitivity or AUTO in settings.exclude:
        details = _sensitivity(settings, model, names, calibration, context)
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
    if settings.steps != 0:
        details |= train(quantized, settings, terms_from(settings.losses, "quantize.losses"), context)
    return quantized, details


def _sensitivity(
    settings: Quantize, model: Model, names: list[str], calibration: Calibration, context: Context
) -> dict[str, Any]:
    """Return the report and, with `exclude: auto`, what to keep; the first process's samples decide for all."""
    samples = first_samples(calibration)
    report = sensitivities(model, names, samples)
    details: dict[str, Any] = {"sensitivity": [asdict(layer) for layer in report]}
    if AUTO in settings.exclude:
        details["kept"], details["damage"] = keep_sensitive(model, report, samples, settings.max_damage)
    return context.fabric.broadcast(details)
