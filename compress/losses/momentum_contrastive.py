"""Image-text alignment with a momentum twin, UPop's task loss (Shi et al. 2023; from ALBEF, Li et al. 2021).

L = (CE(s v [t_m; Q_t]^T, P) + CE(s t [v_m; Q_v]^T, P')) / 2;  P = a softmax(s v_m [t_m; Q_t]^T) + (1 - a) T, where _m is
the slow copy, Q the queue of past features, T uniform over a row's positives and a rises to 0.4 in the first epoch.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("momentum-contrastive")
class MomentumContrastive(Loss):
    """Contrast online features with the slow copy's, against targets the slow copy has a say in."""

    needs = frozenset({"pairs", "momentum"})

    def forward(self, batch: Batch) -> Tensor:
        own, slow = batch.student, batch.momentum
        total = 0.0
        for query, slow_query, keys in ((own.image, slow.image, slow.all_text), (own.text, slow.text, slow.all_image)):
            opinion = (own.scale.detach() * slow_query @ keys.T).softmax(-1)
            targets = slow.alpha * opinion + (1 - slow.alpha) * slow.targets
            total = total + soft_cross_entropy(own.scale * query @ keys.T, targets)
        return total / 2
