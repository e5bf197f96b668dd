"""Masked feature distillation, MFD of CLIP-KD (Yang et al. 2024): embed a picture whose patches are mostly hidden.

L = MSE(v', V) + MSE(t, T);  v' is the student's unit embedding of the picture with `ratio` of its patches at the mean
colour, V the teacher's of the whole picture. In the published code the masked pass is overwritten by the plain one,
which makes it FD; here it is not.
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
    """Mean squared difference of unit embeddings [B, D], the image tower seeing a part only."""

    needs = frozenset({"teacher", "space", "masked"})

    class Settings(Loss.Settings):
        weight: float = 2000.0
        ratio: float = Field(0.75, ge=0, le=1)
        """Part of the patches that is hidden."""
        patch: int = Field(16, ge=1)
        """Side of a hidden square in pixels; it need not be the tower's own patch."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        if sizes.image and any(side % settings.patch for side in sizes.image):
            size = "x".join(map(str, sizes.image))
            raise RecipeError(f"masked-feature: patches of {settings.patch} pixels do not tile {size}. Set 'patch'.")

    def mask_patches(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        patch = self.settings.patch
        rows, columns = (side // patch for side in pixels.shape[2:])
        place = draw(rows * columns).argsort(1)  # of each patch in a random order
        shown = (place >= round(self.settings.ratio * rows * columns)).reshape(-1, 1, rows, columns)
        return pixels * shown.repeat_interleave(patch, 2).repeat_interleave(patch, 3)  # 0: normalised pixels' mean

    def forward(self, batch: Batch) -> Tensor:
        asked = {"image": batch.matched.masked_image, "text": batch.matched.text}
        pairs = zip(batch.sides, each_side(batch), strict=True)
        return sum(F.mse_loss(asked[side], wanted) for side, (_, wanted) in pairs)
