"""Interactive contrastive learning, ICL of CLIP-KD (Yang et al. 2024): student queries, teacher keys.

L = (CE(s v T^T, targets) + CE(s t V^T, targets)) / 2;  capitals are the teacher's unit features, s the student's
exponentiated scale. A tower that does not learn asks nothing.
"""

from torch import Tensor

from clipress.compress.losses import Batch, Loss, soft_cross_entropy


class Interactive(Loss):
    """Contrast the student's embeddings with the teacher's of the other tower."""

    needs = frozenset({"teacher", "space", "keys"})

    def forward(self, batch: Batch) -> Tensor:
        own, wanted = batch.matched, batch.teacher
        asked = {"image": (own.image, wanted.all_text), "text": (own.text, wanted.all_image)}
        terms = [
            soft_cross_entropy(own.scale * query @ keys.T, batch.targets)
            for query, keys in (asked[side] for side in batch.sides)
        ]
        return sum(terms) / len(terms)
