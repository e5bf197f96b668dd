"""Bias correction (Nagel et al., Data-Free Quantization, ICCV 2019, by samples): INT8 without a shift of the mean.

Rounding a layer's weights and inputs moves the mean of each of its outputs. The mean error over calibration samples is
subtracted from the bias, so nothing is added to the model. A layer without a bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from clipress.compress.fabric import Reduce

Linear = nn.Linear | nn.Conv2d


class _MeanError:
    """A forward hook that sums what rounding adds to each output of a layer, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.rows = 0

    def __call__(self, layer: Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        error = output - exact(layer, inputs[0])
        rows = (error.movedim(1, -1) if isinstance(layer, nn.Conv2d) else error).flatten(0, -2)
        self.total = self.total + rows.double().sum(0)
        self.rows += len(rows)


def exact(layer: Linear, x: Tensor) -> Tensor:
    """Return what a layer computes of its inputs without rounding."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, layer.weight, layer.bias)
    return nn.functional.linear(x, layer.weight, layer.bias)


@torch.no_grad()
def correct_biases(
    module: nn.Module,
    names: Iterable[str],
    calibrate: Callable[[nn.Module], None],
    reduce: Reduce = lambda total: total,
) -> int:
    """Correct the biases of the named layers, whose quantizers are calibrated, in place.

    Args:
        module: the model with its quantizers.
        names: its INT8 layers.
        calibrate: runs samples through the model.
        reduce: sums a tensor over processes.

    Returns how many layers have been corrected.
    """
    layers = [layer for name in names if (layer := module.get_submodule(name)).bias is not None]
    errors = [_MeanError() for _ in layers]
    handles = [layer.register_forward_hook(error) for layer, error in zip(layers, errors, strict=True)]
    try:
        calibrate(module)
    finally:
        for handle in handles:
            handle.remove()
    for layer, error in zip(layers, errors, strict=True):
        total = layer.bias.new_zeros(layer.bias.shape, dtype=torch.float64) + error.total
        rows = reduce(total.new_tensor(float(error.rows)))
        layer.bias -= (reduce(total) / rows.clamp_min(1)).to(layer.bias)
    return len(layers)
