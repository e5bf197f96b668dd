"""What is done to a whole batch of images once they are on the device: random erasing, mixup and CutMix.

mixup (Zhang et al. 2018):   x = s x_i + (1 - s) x_j,  s ~ Beta(a, a), one s per batch; j is i in reverse order
CutMix (Yun et al. 2019):    a box of x_i is x_j's, whose area is 1 - s of the image before it is cut at the border
Random erasing (Zhong et al. 2020): a box of an image becomes normal noise

as timm does them and DeiT uses them: with both kinds of mixing, every batch draws one of them. The loss of a mixed row is
s times that of its own label and 1 - s times that of the other one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clipress.data.transforms import Augment

Box = tuple[int, int, int, int]  # top, bottom, left, right
AREA, ASPECT, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10  # of an erased box, as fractions


class Mixing:
    """Changes the batch of a step, drawn from (seed, step, process)."""

    def __init__(self, augment: Augment, seed: int, rank: int) -> None:
        self.augment, self.seed, self.rank = augment, seed, rank

    def __call__(self, step: int, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the arrays with pixels float32 [B, 3, S, S] changed, and for mixed ones `other_label` and `share` [B]."""
        rng = np.random.default_rng([self.seed, step, self.rank])
        pixels = arrays["pixels"]
        if self.augment.random_erase:
            pixels = erased(pixels, self.augment.random_erase, rng)
        if not self.augment.mixes:
            return {**arrays, "pixels": pixels}
        pixels, share = mixed(pixels, self.augment, rng)
        shares = torch.full((len(pixels),), share, device=pixels.device)
        return {**arrays, "pixels": pixels, "other_label": arrays["label"].flip(0), "share": shares}


def mixed(pixels: Tensor, augment: Augment, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Mix every image with the one at the same place from the end. Returns the images and the share of their own pixels."""
    cuts = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
    alpha = augment.cutmix if cuts else augment.mixup
    share, others = float(rng.beta(alpha, alpha)), pixels.flip(0)
    if not cuts:
        return pixels * share + others * (1 - share), share
    top, bottom, left, right = cut_box(pixels.shape[-2:], share, rng)
    pixels = pixels.clone()
    pixels[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    height, width = pixels.shape[-2:]
    return pixels, 1 - (bottom - top) * (right - left) / (height * width)


def cut_box(size: tuple[int, int], share: float, rng: np.random.Generator) -> Box:
    """Return a box around any pixel whose sides are sqrt(1 - share) of an image's, cut at its border."""
    found: list[int] = []
    for side in size:
        half, centre = int(side * np.sqrt(1 - share)) // 2, int(rng.integers(side))
        found += [max(centre - half, 0), min(centre + half, side)]
    return tuple(found)


def erased(pixels: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Fill a box of some images with normal noise, whose area is 2 to 33 % of the image."""
    pixels, (height, width) = pixels.clone(), pixels.shape[-2:]
    for row in np.flatnonzero(rng.random(len(pixels)) < probability):
        for _ in range(TRIES):
            area = rng.uniform(*AREA) * height * width
            aspect = np.exp(rng.uniform(*np.log(ASPECT)))
            h, w = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
            if 0 < h < height and 0 < w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                noise = torch.from_numpy(rng.standard_normal((pixels.shape[1], h, w), np.float32))
                pixels[row, :, top : top + h, left : left + w] = noise.to(pixels.device, non_blocking=True)
                break
    return pixels
