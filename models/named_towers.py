"""The named student towers, one line each: open_clip's settings of an image or a text tower.

CLIP-KD's configs (Yang et al. 2024) put a Linear without bias after timm's features; timm's MobileNetV3 has a layer in
between, which only its own classifier reads. Its RN50 is CLIP's own.
"""

from __future__ import annotations

from typing import Any

from clipress.registry import Registry

IMAGE_TOWERS: Registry[dict[str, Any]] = Registry("image tower", "clipress.models.named_towers")
TEXT_TOWERS: Registry[dict[str, Any]] = Registry("text tower", "clipress.models.named_towers")


def timm_tower(name: str, **more: Any) -> dict[str, Any]:
    """Return the config of timm's tower, averaged over positions, with its own classifier as projection."""
    return {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "", **more}


IMAGE_TOWERS.register("vit-t-16")({"width": 192, "layers": 12, "head_width": 64, "patch_size": 16})
IMAGE_TOWERS.register("vit-b-16")({"width": 768, "layers": 12, "head_width": 64, "patch_size": 16})
IMAGE_TOWERS.register("mobilevit-s")(timm_tower("mobilevit_s", timm_proj="linear"))
IMAGE_TOWERS.register("swin-t")(timm_tower("swin_tiny_patch4_window7_224", timm_proj="linear"))
IMAGE_TOWERS.register("mobilenetv3-s")(timm_tower("mobilenetv3_small_100"))
IMAGE_TOWERS.register("efficientnet-b0")(timm_tower("efficientnet_b0", timm_proj="linear"))
IMAGE_TOWERS.register("resnet-18")(timm_tower("resnet18", timm_proj="linear"))
IMAGE_TOWERS.register("resnet-50")({"width": 64, "layers": [3, 4, 6, 3]})
IMAGE_TOWERS.register("clip-distill")({"width": 576, "layers": 6, "head_width": 24, "patch_size": 32})

TEXT_TOWERS.register("clip-kd")({"width": 384, "heads": 6, "layers": 12})
TEXT_TOWERS.register("clip-distill")({"width": 128, "heads": 8, "layers": 6})
