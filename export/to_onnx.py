"""Artefact -> two ONNX files, image and text tower, that agree with it.

    <folder>/image.onnx    pixel_values f32 [batch, 3, S, S] -> image_embeds f32 [batch, D], unit length
    <folder>/text.onnx     input_ids i64 [batch, L] -> text_embeds f32 [batch, D], unit length
    <folder>/export.json   what both files also carry as metadata, see metadata.py, and what they must hash to

INT8 becomes QuantizeLinear / DequantizeLinear around every product, weights stored as int8: ONNX Runtime fuses these into
integer kernels, TensorRT reads them as explicit quantisation. Of a convolutional tower ONNX Runtime wants another form,
static_int8.py: where that is quicker it is image.onnx, and <folder>/image.qdq.onnx is what TensorRT is given.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from clipress import __version__
from clipress.artifact import Artifact, load_artifact, read_header
from clipress.data.eval_sets import EvalSet
from clipress.errors import ArtifactError, ExportError
from clipress.export import int8_graph as int8
from clipress.export import metadata, parity
from clipress.export.settings import DYNAMO_OPSET, OnnxSettings
from clipress.export.static_int8 import milliseconds, static_int8_from_onnx
from clipress.models import anatomy, quantizers
from clipress.models.convnets import is_convnet
from clipress.models.load import Model
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import self_test_of
from clipress.storage import read_json, sha256, write_whole
from clipress.tasks import model_from_artifact

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


def onnx_from_artifact(
    folder: Path,
    target: Path,
    settings: OnnxSettings,
    sets: Sequence[EvalSet],
    calibration: Callable[[], Sequence[EvalSet]] | None = None,
) -> dict[str, Any]:
    """Export an artefact's towers, check them against torch on real samples, and only then put them in place.

    `calibration` opens the pictures that set activation scales where ONNX Runtime's own quantiser is tried; without it,
    `sets` do. Returns what export.json holds. Raises ExportError when the files do not agree with the model, or it has NaN
    weights.
    """
    artifact = load_artifact(folder)
    if broken := [name for name, weight in artifact.weights.items() if weight.isnan().any()]:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ExportError(
            f"{folder} has weights that are not numbers (NaN): {broken[0]}{more}. Nothing was written. The training that "
            "made it went wrong: look at its log, make it again."
        )
    model = model_from_artifact(artifact)
    described: dict[str, Any] = {}

    def fill(aside: Path) -> None:
        exporters = {tower: _export(model, tower, aside / f"{tower}.onnx", settings) for tower in anatomy.TOWERS}
        described.update(_description(artifact, model, folder.name, settings) | {"exporter": exporters})
        inputs = parity.samples(model.preprocess, model.tokenize(), sets)
        described["parity"] = parity.check(model, aside, inputs, described["precision"])
        if _may_be_static(model, settings):
            described.update(_quickest(model, aside, settings, inputs, calibration() if calibration else sets))
        files = sorted(aside.glob("*.onnx"))
        stamped = {path.name: _stamp(path, {**described, "tower": path.name.partition(".")[0]}) for path in files}
        described["portable"] = all(about["portable"] for about in stamped.values())
        described["self_test"] = {name: about["self_test"] for name, about in stamped.items()}
        described["files"] = {tower: _file(aside / f"{tower}.onnx") for tower in anatomy.TOWERS}
        described["explicit"] = {path.name.partition(".")[0]: _file(path) for path in aside.glob("*.qdq.onnx")}
        (aside / "export.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    write_whole(target, fill)
    return described


def is_exported(folder: Path, target: Path, settings: OnnxSettings) -> bool:
    """Tell whether `target` holds a whole export of this very artefact with these settings."""
    try:
        made = read_json(target / "export.json")
        asked = (SCHEMA_VERSION, read_header(folder)["lineage"][-1]["hash"], settings.of_towers())
        found = (made["schema_version"], made["lineage_hash"], made["settings"])
        return asked == found and "self_test" in made and bool(read_export(target))
    except (OSError, ValueError, LookupError, TypeError, ArtifactError):
        return False


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _description(artifact: Artifact, model: Model, stage: str, settings: OnnxSettings) -> dict[str, Any]:
    import onnxruntime

    bias = getattr(model.module, "logit_bias", None)
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "precision": "int8" if model.quantization else "fp32",
        "embed_dim": int(artifact.architecture["embed_dim"]),
        "logit_scale": float(model.module.logit_scale.detach().exp()),
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


def _may_be_static(model: Model, settings: OnnxSettings) -> bool:
    """Tell whether ONNX Runtime's own INT8 of the image tower is to be tried. Raises ExportError where it cannot be."""
    if not model.quantization or settings.int8 == "qdq":
        return False
    found = None
    if not is_convnet(model.module):
        found = "the image tower is no convolutional one: only those gain by it"
    elif kept := [n for n in _left_out(model) if anatomy.tower_of(model.module, n) == "image"]:
        found = f"{kept[0]} was to stay in full precision, which that form cannot do"
    if found and settings.int8 == "static":
        raise ExportError(f"export.onnx.int8: static was asked for, and {found}. Use int8: auto.")
    return not found


def _left_out(model: Model) -> list[str]:
    """Return the layers that could be INT8 and are not."""
    return [name for name in quantizers.quantizable(model.module) if name not in model.quantization["modules"]]


def _quickest(
    model: Model, folder: Path, settings: OnnxSettings, inputs: Mapping[str, np.ndarray], calibration: Sequence[EvalSet]
) -> dict[str, Any]:
    """Put ONNX Runtime's own INT8 of the image tower in image.onnx's place where it is quicker, or asked for.

    Returns what that changes in the description.
    """
    image, qdq, static = (folder / name for name in ("image.onnx", "image.qdq.onnx", "image.static.onnx"))
    with TemporaryDirectory() as aside:
        plain = Path(aside) / "image.onnx"
        names = model.quantization["modules"]
        quantizers.only(model.module, names, ())
        _export_with(
            Tower(model.module, "image").eval(), sample(model, "image", 2), "image", plain, settings.opset, False
        )
        quantizers.only(model.module, names, names)
        static_int8_from_onnx(plain, static, _pictures(model, calibration), bool(model.quantization.get("portable")))
    taken = milliseconds({"qdq": image, "static": static})
    choice = min(taken, key=taken.__getitem__) if settings.int8 == "auto" else settings.int8
    told: dict[str, Any] = {"int8": {"form": choice, "milliseconds": taken}}
    if choice == "qdq":
        static.unlink()
        return told
    image.rename(qdq)
    static.rename(image)
    return told | {"parity": parity.check(model, folder, inputs, "static int8")}


def _pictures(model: Model, sets: Sequence[EvalSet]) -> Iterator[np.ndarray]:
    """Yield as many pictures as the artefact was calibrated on, float32 [<=16, 3, S, S]."""
    batches = (batch for one in sets for batch in one.pixel_batches(model.preprocess, 16))
    return islice(batches, -(-model.quantization.get("calibrated_on", 512) // 16))


def sample(model: Model, tower: str, batch: int) -> Tensor:
    """Return an input of the right shape and type; its content does not matter."""
    if tower == "image":
        return torch.zeros(batch, 3, *anatomy.image_size(model.module))
    return torch.ones(batch, anatomy.context_length(model.module), dtype=torch.int64)


def _export(model: Model, tower: str, path: Path, settings: OnnxSettings) -> str:
    """Write one tower; returns the exporter that did it."""
    choice = settings.exporter
    if model.quantization or settings.opset < DYNAMO_OPSET:  # dynamo cannot trace modelopt's quantisers
        choice = "torchscript"
    tower_module, inputs = (
        Tower(model.module, tower).eval(),
        sample(model, tower, 2),
    )  # a batch of 1 would become a constant
    if choice in ("auto", "dynamo"):
        try:
            _export_with(tower_module, inputs, tower, path, settings.opset, dynamo=True)
            return "dynamo"
        except Exception as error:
            if choice == "dynamo":
                raise ExportError(
                    f"The dynamo exporter failed on the {tower} tower: {error}. Try exporter: auto."
                ) from error
            path.unlink(missing_ok=True)
    _export_with(tower_module, inputs, tower, path, settings.opset, dynamo=False)
    if model.quantization:
        graph = onnx.load(path)
        int8.tidy(graph)
        metadata.stamp_portable(graph)
        onnx.save(graph, path)
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


def _stamp(path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Put the description and a self-test into a file's metadata, and check the file's form. Returns the metadata."""
    model = onnx.load(path)
    about = {**description, "portable": int8.is_portable(model), "self_test": self_test_of(path)}
    metadata.stamp(model, about)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return about
