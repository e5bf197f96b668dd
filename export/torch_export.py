"""Write one graph of a model as an ONNX file with torch's exporters."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from clipress.errors import ExportError
from clipress.export import int8_graph, metadata, onnx_file
from clipress.export.settings import DYNAMO_OPSET, OnnxSettings
from clipress.models import quantizers
from clipress.models.load import Model
from clipress.runtime.graph import Graph
from clipress.tasks import Task, task_named


class GraphModule(nn.Module):
    """One graph of a model: the graph's inputs in order, its outputs as a tuple."""

    def __init__(self, module: nn.Module, task: Task, graph: Graph) -> None:
        super().__init__()
        self.model, self.task, self.graph = module, task, graph  # `model` begins the names in the file.

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = {one.name: tensor for one, tensor in zip(self.graph.inputs, inputs, strict=True)}
        outputs = self.task.call(self.model, self.graph.name, named)
        return tuple(outputs[one.name] for one in self.graph.outputs)


def export_graph(model: Model, graph: Graph, path: Path, settings: OnnxSettings) -> str:
    """Write one graph with the exporter of the settings. Returns the name of the exporter that succeeded."""
    choice = settings.exporter
    if model.quantization or settings.opset < DYNAMO_OPSET:  # Dynamo cannot trace modelopt's quantizers.
        choice = "torchscript"
    module = GraphModule(model.module, task_named(model.task), graph).eval()
    if choice in ("auto", "dynamo"):
        try:
            write_onnx(module, path, settings.opset, dynamo=True)
            return "dynamo"
        except Exception as error:
            if choice == "dynamo":
                raise ExportError(
                    f"export.onnx.exporter: dynamo failed on the graph '{graph.name}': {error}. Use exporter: auto."
                ) from error
            path.unlink(missing_ok=True)
    write_onnx(module, path, settings.opset, dynamo=False)
    if model.quantization:
        written = onnx_file.read(path)
        int8_graph.tidy(written)
        metadata.stamp_portable(written)
        onnx_file.write(written, path)
    return "torchscript"


def export_without_quantizers(model: Model, graph: Graph, path: Path, opset: int) -> None:
    """Write one graph of an INT8 model in float32."""
    names = model.quantization["modules"]
    quantizers.only(model.module, names, ())
    try:
        write_onnx(GraphModule(model.module, task_named(model.task), graph).eval(), path, opset, dynamo=False)
    finally:
        quantizers.only(model.module, names, names)


def write_onnx(module: GraphModule, path: Path, opset: int, dynamo: bool) -> None:
    """Write one graph with one exporter.

    The batch of every input and output is dynamic, and so is the length of texts that have an end.
    """
    graph = module.graph
    example = tuple(map(torch.from_numpy, graph.example(2).values()))  # A batch of 1 would become a constant.
    takes, gives = ([one.name for one in side] for side in (graph.inputs, graph.outputs))
    axes = {put.name: {0: "batch"} | ({} if put.end is None else {1: "length"}) for put in graph.inputs}
    shapes: dict[str, Any] = {"dynamic_axes": axes | {name: {0: "batch"} for name in gives}}
    if dynamo:
        batch = torch.export.Dim("batch", min=1)
        free = tuple(
            {0: batch} | ({} if put.end is None else {1: torch.export.Dim("length", min=1, max=put.shape[0])})
            for put in graph.inputs
        )
        # With its weights inside, a file would be held four times while protobuf writes it.
        shapes = {"dynamic_shapes": (free,), "external_data": True}
    with warnings.catch_warnings(), torch.no_grad(), TemporaryDirectory(dir=path.parent, prefix=".") as aside:
        made = Path(aside) / path.name
        # The older exporter is deprecated, and warns of traced shapes that are constants here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            str(made),
            input_names=takes,
            output_names=gives,
            opset_version=opset,
            dynamo=dynamo,
            verbose=False,
            **shapes,
        )
        written = onnx_file.read(made)
        _state_shapes(written, graph)
        onnx_file.write(written, path)


def _state_shapes(written: onnx.ModelProto, graph: Graph) -> None:
    """Write the sizes of the outputs down, which tracing can lose: engines and servers read them in the file."""
    for put, known in zip(written.graph.output, graph.outputs, strict=True):
        for side, size in zip(put.type.tensor_type.shape.dim[1:], known.shape, strict=True):
            side.dim_value = size
