"""INT8: calibrate on real samples, then quantisation-aware training with the dense teacher (nvidia-modelopt).

Calibration and training share one set of quantisers, so PTQ (`steps: 0`) and QAT cannot drift apart.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from clipress.compress.context import Context, Training
from clipress.compress.losses import Losses, terms_from
from clipress.compress.train import batches, train
from clipress.models import quantizers
from clipress.models.load import Clip


class Quantize(Training):
    """Settings of `quantize`."""

    dtype: Literal["int8"] = "int8"
    calibrate: int = Field(512, ge=1)
    """Training pairs shown to set the activation scales."""
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
    shown = -(-settings.calibrate // settings.batch_size)

    def calibrate(model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            for arrays in batches(clip, settings, context, shown):
                for name, encode in (("pixels", model.encode_image), ("ids", model.encode_text)):
                    if name in arrays:
                        encode(arrays[name].to(context.fabric.device))

    clip.model.to(context.fabric.device)
    quantizers.attach(clip.model, names, calibrate)
    kept = {"dtype": settings.dtype, "modules": names, "keep": list(settings.keep), "calibrated_on": settings.calibrate}
    quantized = Clip(**{**clip.__dict__, "quantization": kept})
    details = {"quantized_modules": len(names), "steps": 0}
    if settings.steps != 0:
        details |= train(quantized, settings, terms_from(settings.losses, "quantize.losses"), context)
    return quantized, details
