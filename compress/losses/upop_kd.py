"""The search loss of knowledge-guided UPop (CLIP-KDPruning): L_rel + L_same + L_diff.

S = s v [t_m; Q_t]^T (B x M), S' the same for text -> image; S_T the same from the teacher's features and queue.
L_rel  = mean CE(S, a softmax(S_m) + (1 - a) softmax(S_T)):  the teacher's rows replace the one-hot targets
L_same = (MSE(v_T, v) + MSE(t_T, t)) / 2
L_diff = (MSE(S_T, S) + MSE(S_T', S')) / 2, on scaled logits, including the queue
Steps that update the masks use L_rel only, as in the published code.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("upop-kd")
class UpopKd(Loss):
    """Match a frozen copy of the uncut model in ranking, features and similarities."""

    needs = frozenset({"pairs", "teacher", "width", "momentum"})

    def forward(self, batch: Batch) -> Tensor:
        own, ema, teacher = batch.student, batch.momentum, batch.teacher
        ranking = matching = 0.0
        for query, ema_query, keys, teacher_query, teacher_keys in (
            (own.image, ema.image, ema.all_text, teacher.image, ema.teacher_text),
            (own.text, ema.text, ema.all_image, teacher.text, ema.teacher_image),
        ):
            logits, teacher_logits = own.scale * query @ keys.T, teacher.scale * teacher_query @ teacher_keys.T
            soft_targets = (own.scale.detach() * ema_query @ keys.T).softmax(-1)
            targets = ema.alpha * soft_targets + (1 - ema.alpha) * teacher_logits.softmax(-1)
            ranking = ranking + soft_cross_entropy(logits, targets)
            if not batch.masks_move:
                matching = matching + F.mse_loss(logits, teacher_logits)
        if not batch.masks_move:
            matching = matching + F.mse_loss(own.image, teacher.image) + F.mse_loss(own.text, teacher.text)
        return (ranking + matching) / 2
