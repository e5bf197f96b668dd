"""A CLIP of a few hundred thousand parameters with the stock vocabulary, for tests and examples."""

from __future__ import annotations

from typing import Any


def tiny_architecture(
    width: int = 32, layers: int = 2, head_width: int = 16, embed_dim: int = 32, image_size: int = 32, patch: int = 8
) -> dict[str, Any]:
    """Return an open_clip model config, small enough to train within seconds."""
    vision = {
        "image_size": image_size,
        "patch_size": patch,
        "width": width,
        "layers": layers,
        "head_width": head_width,
    }
    text = {
        "context_length": 24,
        "vocab_size": 49408,
        "width": width,
        "heads": width // head_width,
        "layers": layers,
    }
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
