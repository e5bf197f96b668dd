"""Interactive contrastive learning, ICL of CLIP-KD (Yang et al. 2024): student queries, teacher keys.

L = (CE(s v T^T, targets) + CE(s t V^T, targets)) / 2;  capitals are the teacher's unit features, s the student's
exponentiated scale (the published code uses a log-scale without exp).
"""

from torch import Tensor

from clipress.compress.losses import Batch, soft_cross_entropy


def interactive(batch: Batch) -> Tensor:
    """Contrast the student's embeddings with the teacher's of the other tower."""
    own, wanted = batch.student, batch.teacher
    to_text = soft_cross_entropy(own.scale * own.image @ wanted.all_text.T, batch.targets)
    to_image = soft_cross_entropy(own.scale * own.text @ wanted.all_image.T, batch.targets)
    return (to_text + to_image) / 2
