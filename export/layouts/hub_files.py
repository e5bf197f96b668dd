"""The JSON files that Hugging Face's libraries read beside a model: how they are written, and preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipress.data.transforms import Preprocess
from clipress.errors import ExportError

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as the hub has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def image_processor(preprocess: Preprocess) -> dict[str, Any]:
    """Return preprocessor_config.json. Raises ExportError for a way of resizing that it cannot say."""
    side = {"height": preprocess.size, "width": preprocess.size}
    if preprocess.resize_mode == "longest":
        raise ExportError(
            "This layout cannot say that images are padded (resize_mode: longest). Choose the ONNX files as they are."
        )
    crops = preprocess.resize_mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor" if crops else "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.short_side} if crops else side,
        "resample": RESAMPLE[preprocess.interpolation],
        "do_center_crop": crops,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
