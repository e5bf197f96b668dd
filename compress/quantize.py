"""INT8: calibrate on real samples, then quantisation-aware training with the dense teacher (nvidia-modelopt).

Calibration and training share one set of quantisers, so PTQ (`steps: 0`) and QAT cannot drift apart.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from clipress.compress.calibrate import Calibration
from clipress.compress.context import Context, Training
from clipress.compress.losses import Losses, terms_from
from clipress.compress.train import train
from clipress.models import quantizers
from clipress.models.load import Clip


class Quantize(Training):
    """Settings of `quantize`."""

    dtype: Literal["int8"] = "int8"
    calibrate: int = Field(512, ge=1)
    """Training pairs shown to set the activation scales."""
    method: quantizers.Method = "max"
    """What of the activations seen sets their scale; the other two cut off outliers."""
    percentile: float = Field(99.9, gt=50, le=100)
    """Of the absolute activations, with `method: percentile`."""
    keep: tuple[str, ...] = ()
    """Name patterns of modules that stay in full precision."""
    losses: Losses = ("affinity", "feature")
    steps: int | None = Field(None, ge=0)
    """Of quantisation-aware training; 0 calibrates only."""
    lr: float = Field(2e-5, ge=0)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        terms_from(self.losses, "quantize.losses")


def run(settings: Quantize, clip: Clip, context: Context) -> tuple[Clip, dict[str, Any]]:
    """Calibrate, then train with the rounding in place."""
    names = quantizers.quantizable(clip.model, settings.keep)
    clip.model.to(context.fabric.device)
    calibration = Calibration(clip, settings, context, settings.calibrate)
    quantizers.attach(clip.model, names, calibration, settings.method, settings.percentile)
    kept = {
        "dtype": settings.dtype,
        "modules": names,
        "keep": list(settings.keep),
        "calibrated_on": settings.calibrate,
        "method": settings.method,
    }
    quantized = Clip(**{**clip.__dict__, "quantization": kept})
    details = {"quantized_modules": len(names), "steps": 0}
    if settings.steps != 0:
        details |= train(quantized, settings, terms_from(settings.losses, "quantize.losses"), context)
    return quantized, details
