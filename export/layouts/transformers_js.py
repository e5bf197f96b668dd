"""The folder that transformers.js and optimum read: ONNX files of both towers in onnx/, and the JSON files beside them.

    onnx/vision_model.onnx   pixel_values -> image_embeds       vision_model_quantized.onnx where it is INT8
    onnx/text_model.onnx     input_ids -> text_embeds           text_model_quantized.onnx
    config.json, preprocessor_config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json

Embeddings have unit length, where optimum's own exports leave that to the caller: cosines are the same.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from clipress.export import onnx_file
from clipress.export.layouts import LAYOUTS, LayoutJob
from clipress.export.layouts.hub_files import IMAGE, TEXT, image_processor, write_json
from clipress.export.layouts.tokenizer_files import write_tokenizer

FILES = {IMAGE: "vision_model", TEXT: "text_model"}


@LAYOUTS.register("transformers.js")
def write(job: LayoutJob, folder: Path) -> None:
    """Write both graphs under transformers.js's names, and what it needs to feed them."""
    write_onnx(job, folder, "_quantized" if job.exported.precision == "int8" else "")


def write_onnx(job: LayoutJob, folder: Path, ending: str = "") -> None:
    """Write both graphs, their names with an ending, and the JSON files beside them."""
    exported = job.exported
    write_tokenizer(exported, folder)
    write_json(folder / "preprocessor_config.json", image_processor(exported.preprocess))
    shared = {"projection_dim": exported.embed_dim}
    text = {"model_type": "clip_text_model", "max_position_embeddings": exported.tokenizer.context_length, **shared}
    vision = {"model_type": "clip_vision_model", "image_size": exported.preprocess.size, **shared}
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        **shared,
        "text_config": text,
        "vision_config": vision,
    }
    write_json(folder / "config.json", config)
    (folder / "onnx").mkdir()
    for side, name in FILES.items():
        _put(exported.onnx(side), exported.data(side), folder / "onnx" / f"{name}{ending}.onnx")


def _put(source: Path, data: Path | None, target: Path) -> None:
    """Copy a graph, whose weights transformers.js looks for in `<name>.onnx_data` where they lie beside it."""
    if data is None:
        shutil.copyfile(source, target)
        return
    model, beside = onnx_file.read_graph(source), target.with_name(f"{target.name}_data")
    for item in model.graph.initializer:
        for entry in item.external_data:
            if entry.key == "location":
                entry.value = beside.name
    onnx_file.write_graph(model, target)
    shutil.copyfile(data, beside)
