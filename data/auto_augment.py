"""Policies of random operations on an image, drawn from a generator of ours: timm's, such as RandAugment, BLIP's, and photometric distortion.

Sources: AutoAugment (Cubuk et al. 2019), RandAugment (Cubuk et al. 2020), AugMix (Hendrycks et al. 2020), as timm names them.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from clipress.data.blip_augment import blip_augmented
from clipress.data.photometric import distorted
from clipress.data.transforms import BLIP_POLICY, PHOTOMETRIC, Preprocess


def auto_augmented(pixels: np.ndarray, policy: str, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
    """Return pixels uint8 [S, S, 3] after a policy. timm draws from the global generators, which keep their state."""
    if policy == BLIP_POLICY:
        return blip_augmented(pixels, rng)
    if policy == PHOTOMETRIC:
        return distorted(pixels, rng)
    states = random.getstate(), np.random.get_state()
    seed = int(rng.integers(1 << 32))
    try:
        random.seed(seed)
        np.random.seed(seed)
        changed = _transform(policy, preprocess.size, preprocess.mean, preprocess.interpolation)(
            Image.fromarray(pixels)
        )
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return np.asarray(changed, np.uint8)


@lru_cache(maxsize=8)
def _transform(policy: str, size: int, mean: tuple[float, ...], interpolation: str) -> Any:
    """Return a policy with the arguments that timm's own training transform gives it."""
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp

    fill = tuple(min(255, round(255 * value)) for value in mean)
    arguments = {
        "translate_const": int(size * 0.45),
        "img_mean": fill,
        "interpolation": str_to_pil_interp(interpolation),
    }
    kind = policy.partition("-")[0]
    if kind == "augmix":
        return auto_augment.augment_and_mix_transform(policy, {**arguments, "translate_pct": 0.3})
    make = auto_augment.rand_augment_transform if kind == "rand" else auto_augment.auto_augment_transform
    return make(policy, arguments)
