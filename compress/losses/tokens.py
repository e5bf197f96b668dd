"""Token feature distillation: match the teacher's last-layer tokens, the feature term of DGMR (arXiv 2506.08591).

L = MSE(norm(z), norm(Z)) over [B, n, W], image plus text;  z, Z are the outputs of the last blocks, with z projected to the
teacher's width if the widths differ. DGMR compares tokens after each model's final layer norm; `norm` does the same without
the learned affine parameters. DGMR covers images only; for texts all positions count, including padding.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from clipress.compress.losses import LOSSES, Loss
from clipress.errors import RecipeError
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("tokens")
class Tokens(Loss):
    """Mean squared error of token features."""

    needs = frozenset({"teacher", "tokens"})

    class Settings(Loss.Settings):
        norm: bool = True
        """Apply a layer norm without affine parameters to the tokens before comparing them."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.maps = nn.ModuleDict()
        for side in sizes.sides:
            (count, width), (teacher_count, teacher_width) = sizes.student_tokens[side], sizes.teacher_tokens[side]
            if count != teacher_count:
                raise RecipeError(
                    f"tokens: expected as many tokens in the student's {side} tower as in the teacher's ({teacher_count}), "
                    f"found {count}. Use a teacher with the same patch size and context length, or the loss 'feature'."
                )
            if width != teacher_width:
                self.maps[side] = nn.Linear(width, teacher_width)

    def forward(self, batch: Batch) -> Tensor:
        total = 0.0
        for side in batch.sides:
            own, target = (model.tokens[side] for model in (batch.student, batch.teacher))
            pair = (self.maps[side](own) if side in self.maps else own, target)
            total = total + F.mse_loss(*(F.layer_norm(z, z.shape[-1:]) for z in pair) if self.settings.norm else pair)
        return total
