"""Choose the INT8 form of a convolutional graph: explicit Q/DQ, or ONNX Runtime's own where that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from clipress.data.bad_records import BadRecords, read_record
from clipress.data.eval_sets import EvalSet
from clipress.data.transforms import fitted, normalised
from clipress.errors import ExportError
from clipress.export.settings import OnnxSettings
from clipress.export.static_int8 import milliseconds, static_int8_from_onnx
from clipress.export.torch_export import export_without_quantizers
from clipress.models import anatomy, quantizers
from clipress.models.convnets import is_convolutional
from clipress.models.load import Model
from clipress.runtime.export_folder import Int8Form
from clipress.runtime.graph import Arrays, Graph
from clipress.tasks import task_named
from clipress.tasks.clip import Clip

BATCH = 16


def graph_with_two_forms(model: Model, settings: OnnxSettings) -> str | None:
    """Return the graph whose INT8 may have ONNX Runtime's own form, None if there is none.

    Raises ExportError where the settings require that form and the model cannot have it.
    """
    if not model.quantization or settings.int8 == "qdq":
        return None
    task = task_named(model.task)
    graph, found = task.main_graph, None
    if not isinstance(task, Clip) or not is_convolutional(model.module):
        found = f"the graph '{graph}' is not convolutional, and only convolutions gain by it"
    elif kept := [name for name in _float_layers(model) if anatomy.tower_of(model.module, name) == graph]:
        found = f"{kept[0]} stays in full precision, which that form does not support"
    if found and settings.int8 == "static":
        raise ExportError(f"export.onnx.int8: static is not possible: {found}. Use int8: auto.")
    return None if found else graph


def choose_form(
    model: Model, graph: Graph, folder: Path, settings: OnnxSettings, calibration: Sequence[EvalSet]
) -> Int8Form:
    """Write ONNX Runtime's own INT8 of a graph and keep it as `<graph>.onnx` where it is faster or required.

    The file of explicit Q/DQ then becomes `<graph>.qdq.onnx`.
    """
    main, qdq, static = (folder / f"{graph.name}{end}.onnx" for end in ("", ".qdq", ".static"))
    with TemporaryDirectory() as aside:
        plain = Path(aside) / main.name
        export_without_quantizers(model, graph, plain, settings.opset)
        batches = _calibration_batches(model, graph, calibration)
        static_int8_from_onnx(plain, static, batches, bool(model.quantization.get("portable")))
    timings = milliseconds({"qdq": main, "static": static}, graph)
    form = min(timings, key=timings.__getitem__) if settings.int8 == "auto" else settings.int8
    if form == "static":
        main.rename(qdq)
        static.rename(main)
    else:
        static.unlink()
    return Int8Form(form=form, milliseconds=timings)


def _float_layers(model: Model) -> list[str]:
    """Return the layers that could be INT8 and are not."""
    return [name for name in quantizers.quantizable(model.module) if name not in model.quantization["modules"]]


def _calibration_batches(model: Model, graph: Graph, sets: Sequence[EvalSet]) -> Iterator[Arrays]:
    """Yield as many images as the artifact was calibrated on, float32 [<=16, 3, S, S]. Others replace those that cannot be read."""
    (images,), bad = graph.inputs, BadRecords(limit=1)  # training has refused too many
    places = (
        (one.source, range(start, min(start + BATCH, len(one.source))))
        for one in sets
        for start in range(0, len(one.source), BATCH)
    )
    for source, indices in islice(places, -(-model.quantization.get("calibrated_on", 512) // BATCH)):
        records = [read_record(source, index, [index], texts=False) for index in indices]
        bad.count(len(records), [one for record in records for one in record.bad])
        pixels = np.stack([fitted(record.image, model.preprocess) for record in records])
        yield {images.name: normalised(pixels, model.preprocess)}
