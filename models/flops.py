"""Count the multiply-accumulates of what a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting_flops(module: nn.Module) -> Iterator[FlopCounterMode]:
    """Count the operations, two per multiply-accumulate, of what runs inside, without gradients.

    Weights are frozen meanwhile: the counter fails in modules whose input is a parameter, such as an attention pool's latent
    query. Attention runs as plain products, since not every release of the counter knows the fused kernels.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
