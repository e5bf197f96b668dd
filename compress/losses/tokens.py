"""Token features: the last layer's tokens copy the teacher's, the feature term of DGMR (arXiv 2506.08591).

L = MSE(norm(z), norm(Z)) over [B, n, W], image plus text;  z, Z are what the last blocks give, mapped linearly to the
teacher's width where widths differ. DGMR compares tokens after each model's final layer norm; so does `norm`, without the
norm's learned factors. DGMR has images only; of texts every position counts, padding too.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from clipress.compress.losses import LOSSES, Loss
from clipress.errors import RecipeError
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("tokens")
class Tokens(Loss):
    """Mean squared difference of token features."""

    needs = frozenset({"teacher", "tokens"})

    class Settings(Loss.Settings):
        norm: bool = True
        """Compare tokens after a layer norm without factors; else as the last blocks give them."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.maps = nn.ModuleDict()
        for side in sizes.sides:
            (count, width), (wanted, wide) = sizes.student_tokens[side], sizes.teacher_tokens[side]
            if count != wanted:
                raise RecipeError(
                    f"tokens: the {side} tower of the student has {count} tokens, the teacher's {wanted}; they are "
                    "compared one by one. Take a teacher with the same patches and context length, or 'feature'."
                )
            if width != wide:
                self.maps[side] = nn.Linear(width, wide)

    def forward(self, batch: Batch) -> Tensor:
        total = 0.0
        for side in batch.sides:
            own, wanted = (getattr(model, f"{side}_tokens") for model in (batch.student, batch.teacher))
            pair = (self.maps[side](own) if side in self.maps else own, wanted)
            total = total + F.mse_loss(*(F.layer_norm(z, z.shape[-1:]) for z in pair) if self.settings.norm else pair)
        return total
