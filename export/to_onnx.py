"""Artefact -> two ONNX files, image and text tower, that agree with it.

    <folder>/image.onnx    pixel_values f32 [batch, 3, S, S] -> image_embeds f32 [batch, D], unit length
    <folder>/text.onnx     input_ids i64 [batch, L] -> text_embeds f32 [batch, D], unit length
    <folder>/export.json   what both files also carry as metadata, see metadata.py, and what they must hash to

INT8 becomes QuantizeLinear / DequantizeLinear around every product, weights stored as int8: ONNX Runtime fuses these into
integer kernels, TensorRT reads them as explicit quantisation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from clipress import __version__
from clipress.artifact import Artifact, load_artifact, read_header, sha256, write_whole
from clipress.data.evalsets import EvalSet
from clipress.errors import ArtifactError, ExportError
from clipress.export import metadata, parity
from clipress.export.settings import DYNAMO_OPSET, OnnxSettings
from clipress.models import anatomy
from clipress.models.exported import read_export
from clipress.models.load import Clip, clip_from_artifact

SCHEMA_VERSION = 1
# Names must differ from every node torch makes, or the graph is invalid.
NAMES = {"image": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}


class Tower(nn.Module):
    """One encoder with unit-length output."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x: Tensor) -> Tensor:
        encode = self.model.encode_image if self.tower == "image" else self.model.encode_text
        return encode(x, normalize=True)


def onnx_from_artifact(folder: Path, target: Path, settings: OnnxSettings, sets: Sequence[EvalSet]) -> dict[str, Any]:
    """Export an artefact's towers, check them against torch on real samples, and only then put them in place.

    Returns what export.json holds. Raises ExportError when the files do not agree with the model, or it has NaN weights.
    """
    artifact = load_artifact(folder)
    if broken := [name for name, weight in artifact.weights.items() if weight.isnan().any()]:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ExportError(
            f"{folder} has weights that are not numbers (NaN): {broken[0]}{more}. Nothing was written. The training that "
            "made it went wrong: look at its log, make it again."
        )
    clip = clip_from_artifact(artifact)
    described: dict[str, Any] = {}

    def fill(aside: Path) -> None:
        exporters = {tower: _export(clip, tower, aside / f"{tower}.onnx", settings) for tower in anatomy.TOWERS}
        described.update(_description(artifact, clip, folder.name, settings) | {"exporter": exporters})
        described["parity"] = parity.check(clip, aside, sets, described["precision"])
        for tower in anatomy.TOWERS:
            _stamp(aside / f"{tower}.onnx", {**described, "tower": tower})
        described["files"] = {tower: _file(aside / f"{tower}.onnx") for tower in anatomy.TOWERS}
        (aside / "export.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    write_whole(target, fill)
    return described


def is_exported(folder: Path, target: Path, settings: OnnxSettings) -> bool:
    """Tell whether `target` holds a whole export of this very artefact with these settings."""
    try:
        made = json.loads((target / "export.json").read_text(encoding="utf-8"))
        asked = (SCHEMA_VERSION, read_header(folder)["lineage"][-1]["hash"], settings.of_towers())
        found = (made["schema_version"], made["lineage_hash"], made["settings"])
        return asked == found and bool(read_export(target))
    except (OSError, ValueError, LookupError, TypeError, ArtifactError):
        return False


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _description(artifact: Artifact, clip: Clip, stage: str, settings: OnnxSettings) -> dict[str, Any]:
    import onnxruntime

    bias = getattr(clip.model, "logit_bias", None)
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "precision": "int8" if clip.quantization else "fp32",
        "embed_dim": int(artifact.architecture["embed_dim"]),
        "logit_scale": float(clip.model.logit_scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "preprocess": artifact.preprocess,
        "tokenizer": artifact.tokenizer,
        "lineage_hash": artifact.hash,
        "opset": settings.opset,
        "settings": settings.of_towers(),
        "versions": {
            "clipress": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def sample(clip: Clip, tower: str, batch: int) -> Tensor:
    """Return an input of the right shape and type; its content does not matter."""
    if tower == "image":
        return torch.zeros(batch, 3, *anatomy.image_size(clip.model))
    return torch.ones(batch, anatomy.context_length(clip.model), dtype=torch.int64)


def _export(clip: Clip, tower: str, path: Path, settings: OnnxSettings) -> str:
    """Write one tower; returns the exporter that did it."""
    choice = settings.exporter
    if clip.quantization or settings.opset < DYNAMO_OPSET:  # dynamo cannot trace modelopt's quantisers
        choice = "torchscript"
    module, inputs = Tower(clip.model, tower).eval(), sample(clip, tower, 2)  # a batch of 1 would become a constant
    if choice in ("auto", "dynamo"):
        try:
            _export_with(module, inputs, tower, path, settings.opset, dynamo=True)
            return "dynamo"
        except Exception as error:
            if choice == "dynamo":
                raise ExportError(
                    f"The dynamo exporter failed on the {tower} tower: {error}. Try exporter: auto."
                ) from error
            path.unlink(missing_ok=True)
    _export_with(module, inputs, tower, path, settings.opset, dynamo=False)
    if clip.quantization:
        model = onnx.load(path)
        fold_weight_quantizers(model)
        shrink_embedding(model)
        onnx.save(model, path)
    return "torchscript"


def _export_with(module: nn.Module, inputs: Tensor, tower: str, path: Path, opset: int, dynamo: bool) -> None:
    takes, gives = NAMES[tower]
    shapes: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},), "external_data": False}
        if dynamo
        else {"dynamic_axes": {takes: {0: "batch"}, gives: {0: "batch"}}}
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecation of the older exporter, and traced shapes that are constants here
        torch.onnx.export(
            module,
            (inputs,),
            str(path),
            input_names=[takes],
            output_names=[gives],
            opset_version=opset,
            dynamo=dynamo,
            verbose=False,
            **shapes,
        )


def fold_weight_quantizers(model: onnx.ModelProto) -> None:
    """Store weights as int8 instead of float32 behind a QuantizeLinear, in place. Exact, and a quarter of the size."""
    graph = model.graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                constants[node.output[0]] = numpy_helper.to_array(value)
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants]:
        weight, scale = constants[node.input[0]], constants[node.input[1]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        spread = scale if scale.size == 1 else scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        rounded = np.clip(np.rint(weight / spread), -128, 127).astype(np.int8)
        name = f"{node.output[0]}_int8"
        graph.initializer.append(numpy_helper.from_array(rounded, name))
        for user in users[node.output[0]]:
            user.input[:] = [name if i == node.output[0] else i for i in user.input]
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] not in used]:
        graph.node.remove(node)


def shrink_embedding(model: onnx.ModelProto) -> None:
    """Store a token embedding as int8 with one scale per row, in place: of a small CLIP it is most of the file.

    A row is looked up first and scaled then, so only the ids of a text are ever turned back into floats.
    """
    graph = model.graph
    tables = {item.name: item for item in graph.initializer if len(item.dims) == 2 and item.dims[0] > 1024}
    for position, node in enumerate(list(graph.node)):
        if node.op_type != "Gather" or node.input[0] not in tables:
            continue
        table = numpy_helper.to_array(tables[node.input[0]])
        scale = np.maximum(np.abs(table).max(1, keepdims=True), 1e-12).astype(np.float32) / 127
        name, ids, out = node.input[0], node.input[1], node.output[0]
        graph.initializer.remove(tables[name])
        graph.initializer.append(numpy_helper.from_array(np.rint(table / scale).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        parts = [
            onnx.helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"], axis=0),
            onnx.helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"], axis=0),
            onnx.helper.make_node("Cast", [f"{out}_int8"], [f"{out}_whole"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Mul", [f"{out}_whole", f"{out}_scale"], [out]),
        ]
        graph.node.remove(node)
        for offset, part in enumerate(parts):
            graph.node.insert(position + offset, part)
        return


def _stamp(path: Path, description: dict[str, Any]) -> None:
    """Put the description into a file's metadata and check the file's form."""
    model = onnx.load(path)
    metadata.stamp(model, description)
    onnx.checker.check_model(model)
    onnx.save(model, path)
