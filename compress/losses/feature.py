"""Feature distillation, FD of CLIP-KD (Yang et al. 2024): unit embeddings copy the teacher's.

L = MSE(v, V) + MSE(t, T), mean over pairs and dims; hence the published weight of 2000.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import Batch


def feature(batch: Batch) -> Tensor:
    """Mean squared difference of unit embeddings, image plus text."""
    own, wanted = batch.student, batch.teacher
    return F.mse_loss(own.image, wanted.image) + F.mse_loss(own.text, wanted.text)
