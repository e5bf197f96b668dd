"""What a model costs before any clock runs: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipress.models import anatomy
from clipress.models.load import Clip, clip_from_artifact


def macs(clip: Clip) -> dict[str, int]:
    """Count multiply-accumulates of one image and one text, attention's products included (torch's own counter).

    INT8 and 2:4 do the same products; they are counted as dense.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counted = {}
    inputs = {
        "image": torch.zeros(1, 3, *anatomy.image_size(clip.model)),
        "text": torch.ones(1, anatomy.context_length(clip.model), dtype=torch.int64),
    }
    for tower, encode in (("image", clip.model.encode_image), ("text", clip.model.encode_text)):
        # plain products: not every release of the counter knows the fused kernels
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(inputs[tower])
        counted[tower] = counter.get_total_flops() // 2
    return counted


def cost(artifact: Path) -> dict[str, Any]:
    """Return parameters with and without embeddings, in blocks, and MACs of one image and one text together."""
    clip = clip_from_artifact(artifact)
    per_tower = macs(clip)
    return anatomy.counts(clip.model) | {"macs": sum(per_tower.values()), "macs_per_tower": per_tower}
