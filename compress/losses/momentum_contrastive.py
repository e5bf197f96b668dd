"""Image-text contrastive loss with a momentum model, UPop's task loss (Shi et al. 2023; from ALBEF, Li et al. 2021).

L = (CE(s v [t_m; Q_t]^T, P) + CE(s t [v_m; Q_v]^T, P')) / 2;  P = a softmax(s v_m [t_m; Q_t]^T) + (1 - a) T, where _m is
the EMA model, Q the queue of past features, T uniform over a row's positives, and a rises to 0.4 in the first epoch.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("momentum-contrastive")
class MomentumContrastive(Loss):
    """Contrastive loss of online features against the EMA model's, with targets softened by the EMA model."""

    needs = frozenset({"pairs", "momentum"})

    def forward(self, batch: Batch) -> Tensor:
        own, ema = batch.student, batch.momentum
        total = 0.0
        for query, ema_query, keys in ((own.image, ema.image, ema.all_text), (own.text, ema.text, ema.all_image)):
            soft_targets = (own.scale.detach() * ema_query @ keys.T).softmax(-1)
            targets = ema.alpha * soft_targets + (1 - ema.alpha) * ema.targets
            total = total + soft_cross_entropy(own.scale * query @ keys.T, targets)
        return total / 2
