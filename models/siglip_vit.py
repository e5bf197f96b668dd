"""SigLIP's image tower in any size, under a name of timm's registry that holds its size.

timm names the published sizes only, and most of those with the exact GELU, where the published weights were trained with the
tanh approximation (big_vision, and Hugging Face transformers after it). A tower has either.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

NAME = re.compile(r"clipress_siglip_w(\d{1,5})_d(\d{1,3})_h(\d{1,4})_f(\d{1,6})_p(\d{1,3})_i(\d{1,4})(_exact)?")


class Size(NamedTuple):
    """Width, blocks, heads, units of a feed-forward, pixels of a patch's side and of an image's; whether GELU is exact."""

    width: int
    depth: int
    heads: int
    ffn: int
    patch: int
    image: int
    exact: bool = False

    @property
    def name(self) -> str:
        """Return the name under which open_clip finds this tower in timm."""
        return "clipress_siglip_w{}_d{}_h{}_f{}_p{}_i{}".format(*self[:6]) + ("_exact" if self.exact else "")


def size_in(vision: Any) -> Size | None:
    """Return the size that open_clip's vision_cfg names, or None for another tower."""
    name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    found = NAME.fullmatch(name) if isinstance(name, str) else None
    return Size(*map(int, found.groups()[:6]), exact=found[7] is not None) if found else None


def register(vision: Any) -> None:
    """Make the tower of a vision_cfg known to timm, if it is one of these. Raises ValueError for an impossible size."""
    size = size_in(vision)
    if size is None:
        return
    if not all(size[:6]) or size.width % size.heads or size.image < size.patch:
        raise ValueError(f"a SigLIP image tower cannot have the size {size}")
    from timm.models import is_model, register_model

    if is_model(size.name):
        return

    def made(pretrained: bool = False, **kwargs: Any) -> Any:
        return _tower(size, kwargs)

    made.__name__ = size.name
    register_model(made)


def _tower(size: Size, kwargs: dict[str, Any]) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    known = {
        key: kwargs[key] for key in ("num_classes", "global_pool", "drop_path_rate", "patch_drop_rate") if key in kwargs
    }
    model = VisionTransformer(
        **{"num_classes": 0, "global_pool": "map", **known},
        img_size=size.image,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.ffn / size.width,
        class_token=False,
        act_layer=None if size.exact else "gelu_tanh",
    )
    model.default_cfg = model.pretrained_cfg = {"input_size": (3, size.image, size.image)}
    return model
