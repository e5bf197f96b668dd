"""Build modules without memory for their weights, which are then assigned: a large model is in memory once, not twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


def build_weightless(make: Callable[[], nn.Module]) -> nn.Module:
    """Call `make` for a module whose weights have shapes only. Its buffers are real, since a state dict lacks some."""
    try:
        with _shapes_only():
            module = make()
    except RuntimeError:  # timm's hybrid towers, such as MobileCLIP-B's, run their stem once while they are built.
        return make()
    # Some of timm's towers, such as Swin's, make buffers where their weights are.
    return make() if any(buffer.is_meta for buffer in module.buffers()) else module


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Within, parameters of new modules are on the meta device."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_shape
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make these tensors a module's weights and buffers. Raises RuntimeError if names or shapes differ."""
    module.load_state_dict(weights, strict=True, assign=True)
