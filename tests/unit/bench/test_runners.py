"""Runners agree with one another, and say what they cannot do."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from clipress.bench.run import check_answers
from clipress.bench.runners import noise, open_runner
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.bench.runners.onnxruntime_cuda import OnnxRuntimeCudaRunner
from clipress.bench.settings import BenchSettings
from clipress.errors import ArtifactError, ClipressError, RecipeError
from clipress.models.load import artifact_from_model
from clipress.storage import sha256
from clipress.tasks import model_from_artifact

SHAPES = {"image": (3, 3, 32, 32), "text": (3, 24)}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def opened(run, stage, backend, **settings):
    return open_runner(backend, run / stage, run / "export" / stage, BenchSettings(**settings))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("stage", ["pruned", "int8"])
def test_torch_and_onnx_runtime_give_the_same_embeddings(tiny_run, stage):
    run, _ = tiny_run
    first, second = opened(run, stage, "onnxruntime"), opened(run, stage, "torch")
    assert (first.backend, second.backend) == ("onnxruntime", "torch")
    for tower, shape in SHAPES.items():
        a, b = (unit(runner.encode(tower)(noise(tower, shape))) for runner in (first, second))
        assert (a * b).sum(1).min() > (0.9999 if stage == "pruned" else 0.98)
        first.query(tower, 2)()
        second.query(tower, 2)()
    assert second.exported.precision == ("fp32" if stage == "pruned" else "int8 simulated")


@pytest.mark.slow
def test_the_compiled_model_is_held_against_eager_before_it_is_timed(tiny_run, monkeypatch):
    run, _ = tiny_run
    runner = opened(run, "pruned", "torch-compiled")
    runner.query("image", 2)()
    monkeypatch.setattr(torch, "compile", lambda forward, **_: lambda inputs: -forward(inputs))
    with pytest.raises(ClipressError, match="does not agree with eager"):
        runner.query("image", 2)


def test_a_compiler_that_fails_is_one_message(tiny_run, monkeypatch):
    def broken(forward, **_):
        def run(inputs):
            raise RuntimeError("no compiler\nand much more")

        return run

    runner = opened(tiny_run[0], "pruned", "torch-compiled")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RecipeError, match=r"failed on the text tower: no compiler It needs a C\+\+ compiler"):
        runner.query("text", 1)


@no_gpu
@pytest.mark.parametrize("asked", [{"dtype": "bf16"}, {"two_four": True}, {"dtype": "bf16", "two_four": True}])
def test_what_needs_a_gpu_says_so(tiny_run, asked):
    with pytest.raises(RecipeError, match="they need a GPU"):
        opened(tiny_run[0], "sparse", "torch", **asked)


@pytest.mark.gpu
def test_bf16_and_two_four_kernels_agree_with_fp32_on_a_gpu(tiny_run):
    run, _ = tiny_run
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    plain = opened(run, "sparse", "torch")
    for asked in ({"dtype": "bf16"}, {"dtype": "bf16", "two_four": True}):
        other = opened(run, "sparse", "torch", **asked)
        for tower, shape in SHAPES.items():
            a, b = (unit(runner.encode(tower)(noise(tower, shape))) for runner in (plain, other))
            assert (a * b).sum(1).min() > 0.98
            other.query(tower, 2)()


@no_gpu
def test_onnx_runtime_without_cuda_says_what_it_offers(tiny_run):
    with pytest.raises(RecipeError, match=r"offers .*CPUExecutionProvider.*onnxruntime-gpu"):
        opened(tiny_run[0], "pruned", "onnxruntime-cuda")


def test_inputs_bound_to_a_device_give_what_inputs_passed_do(tiny_run):
    class OnTheCpu(OnnxRuntimeCudaRunner):
        provider, place = "CPUExecutionProvider", "cpu"

    runner = OnTheCpu(tiny_run[0] / "export" / "pruned")
    for tower, shape in SHAPES.items():
        session = runner._sessions[tower]
        runner.query(tower, 3)()
        seen = []

        class Seen:
            def __getattr__(self, name, session=session):
                return getattr(session, name)

            def run_with_iobinding(self, binding, session=session, seen=seen):
                session.run_with_iobinding(binding)
                seen.append(binding.copy_outputs_to_cpu()[0])

        runner._sessions[tower] = Seen()
        runner.query(tower, 3)()
        runner._sessions[tower] = session
        np.testing.assert_allclose(seen[0], runner.encode(tower)(noise(tower, shape)), atol=1e-6)


# ---- files that are not ours


def replaced(run, folder, model):
    """A copy of an export whose image tower is another file, hash and all."""
    copy = folder / "export"
    shutil.copytree(run / "export" / "pruned", copy)
    onnx.save(model, copy / "image.onnx")
    described = json.loads((copy / "export.json").read_text())
    described["files"]["image"]["sha256"] = sha256(copy / "image.onnx")
    (copy / "export.json").write_text(json.dumps(described))
    return copy


def tower(shape, operator="ReduceSum", kind=TensorProto.FLOAT):
    """[batch, 3, 32, 32] -> [batch, 3] by summing twice."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    zero = helper.make_tensor("zero", kind, [], [0])
    nodes = [
        helper.make_node("Mul", ["x", "zero"], ["none"]),
        helper.make_node("Div", ["none", "zero"] if operator == "nan" else ["x", "x"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["z"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("z", kind, [shape[0], shape[1]])],
        [axes, zero],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(
    "model", [tower(["b", 3, 64, 64]), tower(["b", 3, 32, 32], kind=TensorProto.DOUBLE), tower([1, 3, 32, 32])]
)
def test_an_onnx_file_that_takes_something_else_is_not_ours(tiny_run, tmp_path, model):
    folder = replaced(tiny_run[0], tmp_path, model)
    with pytest.raises(ArtifactError, match=r"image\.onnx is no image tower .* found x tensor"):
        OnnxRuntimeRunner(folder, 1)


def test_embeddings_that_are_not_numbers_are_refused_before_anything_is_timed(tiny_run, tmp_path):
    fine = OnnxRuntimeRunner(replaced(tiny_run[0], tmp_path / "a", tower(["b", 3, 32, 32])), 1)
    check_answers("fine", fine)
    broken = OnnxRuntimeRunner(replaced(tiny_run[0], tmp_path / "b", tower(["b", 3, 32, 32], "nan")), 1)
    with pytest.raises(ArtifactError, match="odd, image tower: 6 of 6 numbers in its embeddings are NaN"):
        check_answers("odd", broken)


def test_a_model_whose_weights_are_nan_is_refused_in_torch_too(tiny_run, tmp_path):
    from clipress.artifact import save_artifact

    model = model_from_artifact(tiny_run[0] / "pruned")
    next(model.module.visual.parameters()).data.fill_(float("nan"))
    save_artifact(artifact_from_model(model, (), {}), tmp_path / "nan")
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        check_answers("nan", open_runner("torch", tmp_path / "nan", tmp_path, BenchSettings()))
