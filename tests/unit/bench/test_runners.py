"""Runners agree with each other and refuse what they do not support."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from clipress.bench.run import check_answers
from clipress.bench.runners import RUNNERS, Loaded, Runner, open_runner
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.bench.runners.onnxruntime_cuda import OnnxRuntimeCudaRunner
from clipress.bench.runners.torch import use_kernels
from clipress.bench.settings import BenchSettings
from clipress.errors import ArtifactError, ClipressError, RecipeError
from clipress.models.load import artifact_from_model
from clipress.recipe import checked
from clipress.runtime.export_folder import describe_file, read_export
from clipress.runtime.graph import Graph, Input, Output
from clipress.runtime.onnx_session import run_of
from clipress.tasks import model_from_artifact

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def opened(run, stage, backend, **settings):
    return open_runner(backend, run / stage, run / "export" / stage, BenchSettings(**settings))


def embeddings(runner, name):
    """Return unit embeddings [3, D] of random inputs."""
    graph = runner.model.graphs[name]
    (output,) = graph.outputs
    found = runner.run(name)(graph.example(3))
    assert found.keys() == {output.name}
    return found[output.name] / np.linalg.norm(found[output.name], axis=1, keepdims=True)


@pytest.mark.parametrize("stage", ["pruned", "int8"])
def test_torch_and_onnx_runtime_give_the_same_embeddings(tiny_run, stage):
    run, _ = tiny_run
    first, second = opened(run, stage, "onnxruntime"), opened(run, stage, "torch")
    assert (first.backend, second.backend) == ("onnxruntime", "torch")
    assert first.model.graphs == second.model.graphs and first.model.graphs.keys() == {"image", "text"}
    for graph in first.model.graphs:
        a, b = (embeddings(runner, graph) for runner in (first, second))
        assert (a * b).sum(1).min() > (0.9999 if stage == "pruned" else 0.98)
        first.query(graph, 2)()
        second.query(graph, 2)()
    assert second.model.precision == ("fp32" if stage == "pruned" else "int8 simulated")


@pytest.mark.slow
def test_the_compiled_model_is_compared_with_eager_before_timing(tiny_run, monkeypatch):
    run, _ = tiny_run
    runner = opened(run, "pruned", "torch-compiled")
    runner.query("image", 2)()
    monkeypatch.setattr(
        torch, "compile", lambda forward, **_: lambda inputs: {name: -rows for name, rows in forward(inputs).items()}
    )
    with pytest.raises(ClipressError, match="does not agree with eager"):
        runner.query("image", 2)


def test_simulated_int8_is_not_compiled(tiny_run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    opened(tiny_run[0], "int8", "torch-compiled").query("image", 2)()


def test_a_compiler_that_fails_is_one_message(tiny_run, monkeypatch):
    def broken(forward, **_):
        def run(inputs):
            raise RuntimeError("no compiler\nand much more")

        return run

    runner = opened(tiny_run[0], "pruned", "torch-compiled")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RecipeError, match=r"failed on graph 'text': no compiler .*requires a C\+\+ compiler"):
        runner.query("text", 1)


@no_gpu
@pytest.mark.parametrize(
    "settings", [{"dtype": "bf16"}, {"use_sparse_kernels": True}, {"dtype": "bf16", "use_sparse_kernels": True}]
)
def test_settings_that_need_a_gpu_are_refused_without_one(tiny_run, settings):
    with pytest.raises(RecipeError, match="require a GPU"):
        opened(tiny_run[0], "sparse", "torch", **settings)


@pytest.mark.gpu
def test_bf16_and_2_4_kernels_agree_with_fp32_on_a_gpu(tiny_run):
    run, _ = tiny_run
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    plain = opened(run, "sparse", "torch")
    for settings in ({"dtype": "bf16"}, {"dtype": "bf16", "use_sparse_kernels": True}):
        other = opened(run, "sparse", "torch", **settings)
        for graph in plain.model.graphs:
            a, b = (embeddings(runner, graph) for runner in (plain, other))
            assert (a * b).sum(1).min() > 0.98
            other.query(graph, 2)()


def test_sparse_kernels_replace_the_weights_that_torch_accepts(tiny_run, monkeypatch):
    model = model_from_artifact(tiny_run[0] / "sparse")
    weights = model.sparsity["weights"]
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight * 2)
    before = {name: model.module.get_parameter(name).clone() for name in weights}
    assert use_kernels(model.module, model, "bf16", True) == f"bf16, 2:4 in {len(weights)} of {len(weights)}"
    assert all(torch.equal(model.module.get_parameter(name), 2 * rows) for name, rows in before.items())

    def rejected(weight):
        raise RuntimeError("shape")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", rejected)
    assert use_kernels(model.module, model, "bf16", True) == f"bf16, 2:4 in 0 of {len(weights)}"


@no_gpu
def test_onnx_runtime_without_cuda_lists_its_providers(tiny_run):
    with pytest.raises(RecipeError, match=r"offers .*CPUExecutionProvider.*onnxruntime-gpu"):
        opened(tiny_run[0], "pruned", "onnxruntime-cuda")


def test_bound_and_passed_inputs_give_the_same_outputs(tiny_run):
    class OnTheCpu(OnnxRuntimeCudaRunner):
        provider, place = "CPUExecutionProvider", "cpu"

    runner = OnTheCpu(tiny_run[0] / "export" / "pruned")
    for name, graph in runner.model.graphs.items():
        binding, run = runner.bound(name, 3)
        run()
        (found,) = binding.copy_outputs_to_cpu()
        np.testing.assert_allclose(found, runner.run(name)(graph.example(3))[graph.outputs[0].name], atol=1e-6)
        assert runner.query(name, 3)() is None


# ---- foreign files


def replaced(run, folder, model, dim=3):
    """Copy an export, replacing image.onnx and its description; `dim` is the embedding width, None to keep it."""
    copy = shutil.copytree(run / "export" / "pruned", folder / "export")
    exported = read_export(copy)
    onnx.save(model, copy / "image.onnx")
    outputs = (Output(name="image_embeds", shape=(dim or exported.embed_dim,)),)
    graph = exported.graphs["image"].model_copy(update={"outputs": outputs})
    files = exported.files | {"image": describe_file(copy / "image.onnx")}
    exported.model_copy(update={"graphs": exported.graphs | {"image": graph}, "files": files}).write()
    return copy


def tower(shape, operator="ReduceSum", kind=TensorProto.FLOAT):
    """Return a graph [batch, 3, 32, 32] -> [batch, 3] that sums twice."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    zero = helper.make_tensor("zero", kind, [], [0])
    nodes = [
        helper.make_node("Mul", ["pixel_values", "zero"], ["none"]),
        helper.make_node("Div", ["none", "zero"] if operator == "nan" else ["pixel_values", "pixel_values"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["image_embeds"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("pixel_values", kind, shape)],
        [helper.make_tensor_value_info("image_embeds", kind, [shape[0], shape[1]])],
        [axes, zero],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(
    "model", [tower(["b", 3, 64, 64]), tower(["b", 3, 32, 32], kind=TensorProto.DOUBLE), tower([1, 3, 32, 32])]
)
def test_an_onnx_file_with_other_inputs_is_refused(tiny_run, tmp_path, model):
    folder = replaced(tiny_run[0], tmp_path, model)
    with pytest.raises(
        ArtifactError, match=r"image\.onnx .*inputs and outputs of graph 'image'.* found pixel_values tensor"
    ):
        OnnxRuntimeRunner(folder, 1)


def test_nan_embeddings_are_refused_before_timing(tiny_run, tmp_path):
    fine = OnnxRuntimeRunner(replaced(tiny_run[0], tmp_path / "a", tower(["b", 3, 32, 32])), 1)
    check_answers("fine", fine)
    broken = OnnxRuntimeRunner(replaced(tiny_run[0], tmp_path / "b", tower(["b", 3, 32, 32], "nan")), 1)
    with pytest.raises(ArtifactError, match="odd, graph 'image': 6 of 6 values of image_embeds are NaN"):
        check_answers("odd", broken)


def test_embeddings_of_an_unexpected_width_are_refused(tiny_run, tmp_path):
    runner = OnnxRuntimeRunner(replaced(tiny_run[0], tmp_path, tower(["b", 3, 32, 32]), dim=None), 1)
    with pytest.raises(ArtifactError, match=r"expected image_embeds of shape \[2, \d+\], found \[2, 3\]"):
        check_answers("odd", runner)


# ---- graphs of other tasks


class VqaRunner(Runner):
    """A graph with two inputs and logits, like visual question answering."""

    backend = "vqa-test"
    graph = Graph(
        name="question",
        inputs=(Input(name="pixels", dtype="float32", shape=(3, 2, 2)), Input(name="ids", dtype="int64", shape=(5,))),
        outputs=(Output(name="logits", shape=(4, 2)),),
        agrees="logits",
    )

    def __init__(self, logits):
        self.logits = logits
        self.model = Loaded("vqa", {"question": self.graph}, "fp32", None, lambda: None, 1, {})

    @classmethod
    def open(cls, artifact, export, options):
        return cls(1.0)

    def run(self, graph):
        def run(inputs):
            assert {name: rows.shape for name, rows in inputs.items()} == {"pixels": (2, 3, 2, 2), "ids": (2, 5)}
            return {"logits": np.full((2, 4, 2), self.logits)}

        return run

    def query(self, graph, batch, ids=0):
        return lambda: None


def test_outputs_of_any_shape_are_checked_and_graphs_may_have_several_inputs():
    check_answers("fine", VqaRunner(1.0))
    with pytest.raises(ArtifactError, match="odd, graph 'question': 16 of 16 values of logits are NaN"):
        check_answers("odd", VqaRunner(np.nan))


def test_an_onnx_file_with_two_inputs_is_fed_by_name():
    names = [("a", TensorProto.FLOAT, ["b", 2]), ("b", TensorProto.FLOAT, ["b", 2])]
    puts = [helper.make_tensor_value_info(*one) for one in names]
    outs = [helper.make_tensor_value_info("difference", TensorProto.FLOAT, ["b", 2])]
    graph = helper.make_graph([helper.make_node("Sub", ["a", "b"], ["difference"])], "g", puts, outs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = run_of(session)({"b": np.ones((3, 2), "f"), "a": np.full((3, 2), 5, "f")})
    assert (found["difference"] == 4).all()


def test_runners_are_registered_under_their_backends_and_others_can_be_added(tmp_path):
    assert RUNNERS and all(name == runner.backend for name, runner in RUNNERS.items())
    with pytest.raises(RecipeError, match="Did you mean 'torch'"):
        checked(BenchSettings, {"backends": ["tochr"]}, "bench")
    with RUNNERS.registered("vqa-test", VqaRunner):
        settings = checked(BenchSettings, {"backends": ["vqa-test"]}, "bench")
        assert open_runner(*settings.backends, tmp_path, tmp_path, settings).logits == 1.0


def test_a_model_with_nan_weights_is_refused_in_torch(tiny_run, tmp_path):
    from clipress.artifact import save_artifact

    model = model_from_artifact(tiny_run[0] / "pruned")
    next(model.module.visual.parameters()).data.fill_(float("nan"))
    save_artifact(artifact_from_model(model, (), {}), tmp_path / "nan")
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        check_answers("nan", open_runner("torch", tmp_path / "nan", tmp_path, BenchSettings()))
