"""Artifact -> one ONNX file per graph that agrees with torch, and export.json.

    <folder>/<graph>.onnx   inputs and outputs by the names of the task's graph, the batch dynamic;
        CLIP: image.onnx  pixel_values f32 [batch, 3, S, S] -> image_embeds f32 [batch, D], normalized
              text.onnx   input_ids i64 [batch, L] -> text_embeds f32 [batch, D], normalized
    <folder>/export.json    what the files also carry as metadata, see metadata.py, and their hashes

INT8 becomes QuantizeLinear / DequantizeLinear around every product, with weights stored as int8: ONNX Runtime fuses
these into integer kernels, and TensorRT reads them as explicit quantization. For a convolutional graph ONNX Runtime
prefers another form, static_int8.py; where that is faster it is <graph>.onnx, and TensorRT reads <graph>.qdq.onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch

from clipress.artifact import Artifact, load_artifact
from clipress.data.eval_sets import EvalSet, on_readable
from clipress.errors import ExportError
from clipress.export import metadata, onnx_file, parity
from clipress.export.int8_form import choose_form, graph_with_two_forms
from clipress.export.int8_graph import is_portable
from clipress.export.settings import OnnxSettings
from clipress.export.torch_export import export_graph
from clipress.memory import release_memory
from clipress.models.load import Model
from clipress.runtime.export_folder import Exported, OnnxFile, describe_file
from clipress.runtime.onnx_session import self_test_of
from clipress.storage import write_whole
from clipress.tasks import graphs_of, model_from_artifact, runs_of, task_named
from clipress.version import __version__


def onnx_from_artifact(
    folder: Path,
    target: Path,
    settings: OnnxSettings,
    sets: Sequence[EvalSet],
    calibration: Callable[[], Sequence[EvalSet]] | None = None,
) -> Exported:
    """Export an artifact's graphs, compare them with torch on real samples, and only then put them in place.

    `calibration` opens the images that set activation scales where ONNX Runtime's own quantizer is tried; without it,
    `sets` do. Raises ExportError when a file does not agree with the model, or the model has NaN weights.
    """
    model, lineage_hash = _loaded(folder)
    made: list[Exported] = []

    def fill(aside: Path) -> None:
        exported = _without_files(model, lineage_hash, folder.name, aside, settings)
        exporters = {
            name: export_graph(model, graph, aside / f"{name}.onnx", settings)
            for name, graph in exported.graphs.items()
        }
        task = task_named(model.task)
        samples = on_readable(lambda good: task.samples(good, model.preprocess, model.tokenize()), sets)
        samples = task.completed(samples, runs_of(model))
        checked = {"exporter": exporters, "parity": parity.check(model, aside, samples, exported.precision)}
        if two_forms := graph_with_two_forms(model, settings):
            images = calibration() if calibration else sets
            checked["int8"] = choose_form(model, exported.graphs[two_forms], aside, settings, images)
            if checked["int8"].form == "static":
                checked["parity"] = parity.check(model, aside, samples, "static int8")
        model.module.to_empty(device="meta")  # A large model need not stay beside the sessions of the self-tests.
        release_memory()
        exported = _stamped(exported.model_copy(update=checked))
        exported.write()
        made.append(exported.model_copy(update={"folder": target}))

    write_whole(target, fill)
    return made[-1]


def _loaded(folder: Path) -> tuple[Model, str]:
    """Return an artifact's model and the hash of its lineage."""
    artifact = load_artifact(folder)
    _refuse_nan(artifact, folder)
    return model_from_artifact(artifact), artifact.hash


def _refuse_nan(artifact: Artifact, folder: Path) -> None:
    if broken := [name for name, weight in artifact.weights.items() if weight.isnan().any()]:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ExportError(
            f"{folder} has weights that are not numbers (NaN): {broken[0]}{more}. Nothing was written. Its training "
            "diverged: look at the log and train it again."
        )


def _without_files(model: Model, lineage_hash: str, stage: str, folder: Path, settings: OnnxSettings) -> Exported:
    """Describe an export before its files are hashed and compared."""
    import onnxruntime

    graphs = graphs_of(model)
    return Exported(
        folder=folder,
        task=model.task,
        stage=stage,
        precision="int8" if model.quantization else "fp32",
        graphs=graphs,
        **task_named(model.task).describe(model),
        preprocess=model.preprocess,
        tokenizer=model.tokenizer,
        lineage_hash=lineage_hash,
        opset=settings.opset,
        settings=settings.of_graphs(),
        versions={
            "clipress": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        files={name: OnnxFile(file=f"{name}.onnx", sha256="") for name in graphs},
    )


def _stamped(exported: Exported) -> Exported:
    """Put metadata and a self-test into every file and check its form. Returns the export with its files described."""
    tests, portable = {}, {}
    explicit = {name: path for name in exported.graphs if (path := exported.folder / f"{name}.qdq.onnx").is_file()}
    for name, path in [*((name, exported.onnx(name)) for name in exported.graphs), *explicit.items()]:
        tests[path.name] = self_test_of(path, [exported.graphs[name]])
        release_memory()
        portable[path.name] = exported.precision == "fp32" or is_portable(onnx_file.read(path))
        about = metadata.of_graph(exported, name)
        metadata.stamp_file(path, {**about, "portable": portable[path.name], "self_test": tests[path.name]})
    return exported.model_copy(
        update={
            "portable": all(portable.values()),
            "self_test": tests,
            "files": {name: describe_file(exported.onnx(name)) for name in exported.graphs},
            "explicit": {name: describe_file(path) for name, path in explicit.items()},
        }
    )
