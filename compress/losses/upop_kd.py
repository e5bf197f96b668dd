"""The search loss of knowledge-guided UPop (CLIP-KDPruning): L_rel + L_same + L_diff.

S = s v [t_m; Q_t]^T (B x M) and its twin the other way; S_T the same from the teacher's features and queue.
L_rel  = mean CE(S, a softmax(S_m) + (1 - a) softmax(S_T)):  the teacher's rows replace the one-hot targets
L_same = (MSE(v_T, v) + MSE(t_T, t)) / 2
L_diff = (MSE(S_T, S) + MSE(S_T', S')) / 2, on scaled logits, queue columns included
On the steps that move the masks only L_rel is taken, as in the published code.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("upop-kd")
class UpopKd(Loss):
    """Follow a frozen copy of the uncut model in ranking, features and similarities."""

    needs = frozenset({"pairs", "teacher", "width", "momentum"})

    def forward(self, batch: Batch) -> Tensor:
        own, slow, wanted = batch.student, batch.momentum, batch.teacher
        ranking = copying = 0.0
        for query, slow_query, keys, teacher_query, teacher_keys in (
            (own.image, slow.image, slow.all_text, wanted.image, slow.teacher_text),
            (own.text, slow.text, slow.all_image, wanted.text, slow.teacher_image),
        ):
            logits, truth = own.scale * query @ keys.T, wanted.scale * teacher_query @ teacher_keys.T
            opinion = (own.scale.detach() * slow_query @ keys.T).softmax(-1)
            targets = slow.alpha * opinion + (1 - slow.alpha) * truth.softmax(-1)
            ranking = ranking + soft_cross_entropy(logits, targets)
            if not batch.masks_move:
                copying = copying + F.mse_loss(logits, truth)
        if not batch.masks_move:
            copying = copying + F.mse_loss(own.image, wanted.image) + F.mse_loss(own.text, wanted.text)
        return (ranking + copying) / 2
