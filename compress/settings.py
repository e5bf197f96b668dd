"""Settings shared by all training stages, and the `runtime` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipress.errors import RecipeError
from clipress.recipe import Section


class Training(Section):
    """Optimizer, schedule and batch size of a stage."""

    name: str | None = None
    """Name of the artifact. Default: depends on the kind of stage."""
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    """Passes over the first training source. Set either `steps` or `epochs`."""
    epoch_counts: Literal["items", "captions"] = "items"
    """What an epoch shows once: every item with one of its captions, or every caption, as UPop counts. The weight of a
    momentum model rises for one epoch."""
    batch_size: int = Field(128, ge=2)
    """Global batch size, summed over all processes."""
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    decay_vectors: bool = False
    """Apply weight decay to norms, biases and scales too, as UPop does."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has Nesterov momentum; Segmenter is trained with it."""
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = Field(0.9, gt=0, lt=1)
    """Of `sgd`."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Fraction of the steps used for linear warmup."""
    lr_schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Learning rate after warmup: cosine decay, the remaining share of steps to the power of 0.9, or constant."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at which `cosine` and `poly` end."""
    grad_clip_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    queue_size: int = Field(0, ge=0)
    """Past pairs kept as extra negatives by losses with a momentum model; UPop uses 57,600."""
    queue_start: Literal["empty", "random"] = "empty"
    """What the queue holds at the start: nothing, or random unit rows that match no pair, as in UPop's code."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: the probability that a residual branch of the last block is left out, rising from 0 in the first. For
    vision transformers of timm's; DeiT has 0.1."""
    towers: str = "both"
    """Towers to train: `both`, or the name of one. The other is frozen, and skipped if no loss uses it."""

    def model_post_init(self, _: object) -> None:
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise RecipeError(f"A training stage: expected either 'steps' or 'epochs', found {found}.")


class Runtime(Section):
    """The `runtime` section. To use several processes, start the same command with torchrun."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs that support it, fp32 otherwise."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """auto: DDP with several processes."""
    grad_cache_chunks: int = Field(1, ge=1)
    """Split each batch into this many chunks (GradCache) to save memory. The losses still see the full batch, so the
    gradients are the same."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: saves memory, takes about a third longer."""
    compile: bool = False
    """Compile student and teachers with torch.compile: a minute or more per stage and length of texts, then faster steps. Needs a
    C++ compiler, and Triton on a GPU. Not supported with fsdp2."""
    checkpoint_every: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps between checkpoints for resuming a stopped stage; 0 writes none. `auto`: one a minute, or fewer so that writing
    takes at most 2 % of the time."""
    local_loss: bool = True
    """Each process computes the loss of its own rows against all rows; otherwise every process computes it for all rows.
    The gradients are the same."""

    def model_post_init(self, _: object) -> None:
        if self.compile and self.strategy == "fsdp2":
            raise RecipeError(
                "runtime.compile: expected strategy auto or ddp, found fsdp2, whose shards it has not been tried with. Remove one of them."
            )
