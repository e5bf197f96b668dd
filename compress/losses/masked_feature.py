"""Masked feature distillation, MFD of CLIP-KD (Yang et al. 2024): match the teacher from a mostly masked image.

L = MSE(v', V) + MSE(t, T);  v' is the student's unit embedding of the image with `ratio` of its patches set to the mean
color, V the teacher's embedding of the full image. The published code overwrites the masked pass with the plain one, which
reduces it to FD; this one does not.
"""

from collections.abc import Callable

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.errors import RecipeError
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("masked-feature")
class MaskedFeature(Loss):
    """Mean squared error of L2-normalized embeddings [B, D], with masked images for the student."""

    needs = frozenset({"teacher", "space", "masked"})

    class Settings(Loss.Settings):
        weight: float = 2000.0
        ratio: float = Field(0.75, ge=0, le=1)
        """Fraction of the patches to mask."""
        patch: int = Field(16, ge=1)
        """Size of a masked patch in pixels; may differ from the tower's patch size."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        if sizes.image and any(side % settings.patch for side in sizes.image):
            size = "x".join(map(str, sizes.image))
            raise RecipeError(
                f"masked-feature.patch: expected a divisor of the image size {size}, found {settings.patch}. Set 'patch'."
            )

    def mask_patches(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        patch = self.settings.patch
        rows, columns = (side // patch for side in pixels.shape[2:])
        rank = draw(rows * columns).argsort(1)  # a random order of the patches
        shown = (rank >= round(self.settings.ratio * rows * columns)).reshape(-1, 1, rows, columns)
        return pixels * shown.repeat_interleave(patch, 2).repeat_interleave(patch, 3)  # 0 is the mean color

    def forward(self, batch: Batch) -> Tensor:
        own = {"image": batch.matched.masked_image, "text": batch.matched.text}
        pairs = zip(batch.sides, each_side(batch), strict=True)
        return sum(F.mse_loss(own[side], target) for side, (_, target) in pairs)
