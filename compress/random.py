"""torch's random numbers in training: dropout, stochastic depth, and the negatives that are drawn in a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric

RandomState = Mapping[str, Tensor]
"""The state of torch's generators, by kind of device."""


def random_state() -> RandomState:
    """Return the state of torch's generators in this process."""
    gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **gpu}


def set_random_state(state: RandomState) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def seeded(seed: int, fabric: Fabric) -> Iterator[None]:
    """Draw torch's random numbers from a seed, others on every process. What comes after has the state from before."""
    before = random_state()
    torch.manual_seed(seed * 1_000_003 + fabric.global_rank)
    try:
        yield
    finally:
        set_random_state(before)
