"""The folder that immich's machine-learning service reads for a CLIP of open_clip's.

    config.json                                 open_clip's config, of which the context length is read
    visual/model.onnx                           image f32 [batch, 3, S, S] -> unit embeddings
    visual/preprocess_cfg.json
    textual/model.onnx                          text i32 [batch, L] -> unit embeddings
    textual/tokenizer.json, tokenizer_config.json, special_tokens_map.json

The service pads texts to the context length itself.
"""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, TensorProto, helper

from clipress.artifact import read_header
from clipress.errors import ExportError
from clipress.export import metadata, onnx_file
from clipress.export.layouts import LAYOUTS, LayoutJob
from clipress.export.layouts.hub_files import write_json
from clipress.export.layouts.tokenizer_files import write_tokenizer
from clipress.runtime.served import IMAGE, TEXT

PLACES = {IMAGE: ("visual", "image"), TEXT: ("textual", "text")}
"""Folder and input of each graph."""


@LAYOUTS.register("immich")
def write(job: LayoutJob, folder: Path) -> None:
    """Write both graphs with immich's names of their inputs, and the files that prepare them."""
    exported = job.clip("immich")
    if exported.preprocess.resize_mode == "longest" or exported.preprocess.crop_pct < 1:
        raise ExportError(
            "--layout immich: it can neither pad images (resize_mode: longest) nor crop their margin (crop_pct)."
        )
    write_json(folder / "config.json", read_header(job.artifact)["architecture"])
    keys = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")
    write_json(
        folder / "visual" / "preprocess_cfg.json", {"mode": "RGB", **exported.preprocess.model_dump(include=set(keys))}
    )
    write_tokenizer(exported, folder / "textual")
    for side, (place, name) in PLACES.items():
        model = onnx_file.read(exported.onnx(side))
        about = metadata.read_metadata(model) or {}
        _rename_input(model, name)
        # What speaks of the old input is left out: its self-test, and where its texts end.
        metadata.stamp(model, {key: value for key, value in about.items() if key not in ("self_test", "ends")})
        onnx_file.write(model, folder / place / "model.onnx")


def _rename_input(model: ModelProto, name: str) -> None:
    """Rename a graph's only input, in place; ids come as int32 and are widened."""
    (put,) = model.graph.input
    old, put.name = put.name, name
    if put.type.tensor_type.elem_type == TensorProto.INT64:
        put.type.tensor_type.elem_type = TensorProto.INT32
        model.graph.node.insert(
            0, helper.make_node("Cast", [name], [old], name=f"{name}_as_int64", to=TensorProto.INT64)
        )
        return
    for node in model.graph.node:
        node.input[:] = [name if one == old else one for one in node.input]
