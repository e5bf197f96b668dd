"""Settings that every stage with a training loop shares, and where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipress.errors import RecipeError
from clipress.recipe import Section


class Training(Section):
    """Optimizer, schedule and batch of a stage."""

    name: str | None = None
    """Name of the artifact; default: the stage's."""
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    """Passes over the first training source, instead of steps."""
    batch_size: int = Field(128, ge=2)
    """Items per step, all processes together."""
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After that it falls to zero as a half cosine, or stays."""
    grad_clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    queue_size: int = Field(0, ge=0)
    """Past pairs that losses with a momentum model contrast with; UPop keeps 57,600."""
    towers: str = "both"
    """Which tower learns: `both`, or the name of one. The other is frozen, and not even run where no loss reads it."""

    def model_post_init(self, _: object) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("A training stage requires either 'steps' or 'epochs'.")


class Runtime(Section):
    """The `runtime` section. Several processes: start the same command with torchrun."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU that has it, else fp32."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """auto: DDP when there are several processes."""
    grad_cache_chunks: int = Field(1, ge=1)
    """Parts a batch is worked through in; the losses still see the whole batch, so the step is the same one."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_every: int = Field(200, ge=0)
    """Steps between checkpoints, from which a stopped stage is continued; 0 writes none, and so does fsdp2."""
    local_loss: bool = True
    """Each process scores its own rows against all; else every process scores all. The gradient is the same."""
