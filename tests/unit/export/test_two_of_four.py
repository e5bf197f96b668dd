"""2:4 zeros are in the ONNX files: counted group by group, and by polygraphy, an independent tool."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clipress.artifact import load_artifact, save_artifact
from clipress.compress import quantize, sparsify
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.quantize import Quantize
from clipress.compress.settings import Runtime
from clipress.compress.sparsify import Sparsify
from clipress.data.eval_sets import evalsets
from clipress.data.spec import DataSpec, SourceSpec
from clipress.export import parity
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact

SHORT = {"steps": 2, "batch_size": 8, "losses": ["contrastive"], "lr": 1e-3}
RESNET = {
    **tiny_architecture(layers=1),
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
}
ARCHITECTURES = {"vit": tiny_architecture(layers=1), "resnet": RESNET}
THROUGH = ("QuantizeLinear", "DequantizeLinear", "Cast")


@pytest.fixture(
    scope="module", params=[("vit", "magnitude"), ("vit", "sparsegpt"), ("resnet", "magnitude")], ids="-".join
)
def run(request, tmp_path_factory):
    """A model that is sparsified and fine-tuned, then trained in INT8; exported after both steps."""
    (name, method), folder = request.param, tmp_path_factory.mktemp("run")
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=10)])
    data = DataSpec(train=(SourceSpec(format="scenes", limit=40),))
    model = new_model(ARCHITECTURES[name], 0)
    for stage, kind, settings in (
        ("sparse", sparsify, Sparsify(method=method, calibrate=16, **SHORT)),
        ("int8", quantize, Quantize(calibrate=16, **SHORT)),
    ):
        context = Context(start_fabric(Runtime(accelerator="cpu")), data, 0, teachers=(model.copy(),), title=stage)
        model, _ = kind.run(settings, model, context)
        save_artifact(artifact_from_model(model, ({"stage": stage, "hash": stage},), {}), folder / stage)
        with pytest.MonkeyPatch.context() as patch:  # An untrained model rounds worse than a trained one.
            patch.setitem(parity.LIMITS, "int8", (0.9, 0.1, 5e-3))
            onnx_from_artifact(folder / stage, folder / "export" / stage, OnnxSettings(exporter="torchscript"), sets)
        model = model_from_artifact(folder / stage)
    return folder


@pytest.fixture(params=["sparse", "int8"])
def exported(run, request):
    """The artifact and its two files."""
    files = {tower: run / "export" / request.param / f"{tower}.onnx" for tower in ("image", "text")}
    return load_artifact(run / request.param), files


def products(model):
    """Yield the name, stored values and input-channel axis of each weight of a Conv, MatMul or Gemm."""
    graph = model.graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        name, axis = node.input[1], 1 if node.op_type == "Conv" or transposed else 0
        while name in made_by and made_by[name].op_type in (*THROUGH, "Transpose"):
            maker = made_by[name]
            if maker.op_type == "Transpose":
                axis = next(a.ints for a in maker.attribute if a.name == "perm")[axis]
            name = maker.input[0]
        if name in stored:
            yield name, stored[name], axis


def zeros_per_four(weight, axis):
    """Return how many of each four weights in a row along an axis are zero."""
    return (np.moveaxis(weight, axis, -1).reshape(-1, 4) == 0).sum(1)


def of_tower(names, tower):
    return [name for name in names if name.startswith("visual.") == (tower == "image")]


def test_two_of_each_four_weights_in_the_files_are_zero(exported):
    artifact, files = exported
    for tower, path in files.items():
        found = list(products(onnx.load(path)))
        assert len(found) == len(of_tower([*artifact.sparsity["weights"], *artifact.sparsity["skipped"]], tower))
        whole = [(weight, axis) for _, weight, axis in found if weight.shape[axis] % 4 == 0]
        sparse = [weight for weight, axis in whole if (zeros_per_four(weight, axis) >= 2).all()]
        assert len(sparse) == len(of_tower(artifact.sparsity["weights"], tower)) > 3
        kinds = {weight.dtype.name for weight in sparse}
        assert kinds == {"int8" if artifact.quantization else "float32"}
        assert all((weight != 0).mean() > 0.4 for weight in sparse)  # The other weights are not zero.


def test_convolutions_hold_the_pattern_along_their_input_channels_and_no_other_axis(run):
    model = onnx.load(run / "export" / "sparse" / "image.onnx")
    convs = [
        w for _, w, axis in products(model) if w.ndim == 4 and axis == 1 and w.shape[1] % 16 == 0 == w.shape[0] % 8
    ]
    if not convs:
        pytest.skip("the patch embedding has three input channels")
    for weight in convs:
        assert (zeros_per_four(weight, 1) >= 2).all()
        assert not (zeros_per_four(weight, 0) >= 2).all()


def in_float(path, folder):
    """Write a file with its int8 weights as floats: polygraphy skips tensors that are not floats."""
    model = onnx.load(path)
    graph = model.graph
    for item in graph.initializer:
        if item.data_type == onnx.TensorProto.INT8:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype("f"), item.name))
    onnx.save(model, folder / path.name)
    return folder / path.name


def test_polygraphy_finds_the_same_weights_eligible_and_sparse(exported, tmp_path):
    artifact, files = exported
    weights, skipped, shapes = artifact.sparsity["weights"], artifact.sparsity["skipped"], artifact.weights
    for tower, path in files.items():
        report = subprocess.run(
            [Path(sys.executable).with_name("polygraphy"), "inspect", "sparsity", in_float(path, tmp_path)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        eligible = int(re.search(r"Found: (\d+) weight tensor", report)[1])
        fours = [  # Polygraphy requires whole groups of four.
            name
            for name in of_tower(skipped, tower)
            if (shapes[f"{name}.weight"].shape[1] if f"{name}.weight" in shapes else shapes[name].shape[0]) % 4 == 0
            # In INT8 files this is a product of 8 x 8 x 3 inputs.
            or (name == "visual.conv1" and artifact.quantization)
        ]
        assert report.count("Found sparse tensor") == len(of_tower(weights, tower))
        assert report.count("Found non-sparse tensor") == len(fours)
        assert eligible == len(of_tower(weights, tower)) + len(fours)
