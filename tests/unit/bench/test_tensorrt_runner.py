"""The TensorRT runner matches ONNX Runtime and times its phases separately."""

import shutil

import numpy as np
import pytest
from fake_tensorrt import fake_machine
from helpers import clipress

from clipress.artifact import save_artifact
from clipress.bench.latency import measure_in_turns
from clipress.bench.runners import tensorrt
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.bench.runners.tensorrt import TensorRTRunner
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import ArtifactError, BackendMissing, ExportError
from clipress.export.settings import OnnxSettings, TensorRTSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.export.to_tensorrt import engines_from_export, prepare_export
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.tensorrt import find_machine

SETTINGS = TensorRTSettings(batch={"opt": 2, "max": 4})


def with_engines(export, machine, settings):
    """Build an export folder's engines."""
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=10)])
    engines_from_export(export, prepare_export(export, settings), machine, settings, sets)
    return export


def export_with_engines(folder, machine, settings=SETTINGS):
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=10)])
    model = new_model(tiny_architecture(layers=1), 0)
    artifact = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), folder / "x")
    onnx_from_artifact(artifact, folder / "export" / "x", OnnxSettings(exporter="torchscript"), sets)
    return with_engines(folder / "export" / "x", machine, settings)


@pytest.fixture(scope="module")
def machine():
    return fake_machine()


@pytest.fixture(scope="module")
def export(tmp_path_factory, machine):
    return export_with_engines(tmp_path_factory.mktemp("run"), machine)


def held_against_onnx_runtime(export, runner):
    other = OnnxRuntimeRunner(export, 1)
    rng = np.random.default_rng(0)
    for tower, inputs in (
        ("image", {"pixel_values": rng.standard_normal((5, 3, 32, 32)).astype("f")}),
        ("text", {"input_ids": rng.integers(1, 400, (5, 24))}),
    ):
        wanted, found = (one.run(tower)(inputs)[f"{tower}_embeds"] for one in (other, runner))
        assert (wanted * found).sum(1).min() > 0.99
        measured = measure_in_turns(
            {"one": runner.query(tower, 2), "other": other.query(tower, 2)}, warm_up_ms=0, duration_ms=0, iterations=3
        )
        assert {name: len(timings.latency) for name, timings in measured.items()} == {"one": 3, "other": 3}
        phases = runner.phases(tower, 2, iterations=4)
        assert {key: len(times) for key, times in phases.items()} == dict.fromkeys(
            ("h2d_ms", "compute_ms", "d2h_ms", "latency_ms"), 4
        )
        total = phases["h2d_ms"] + phases["compute_ms"] + phases["d2h_ms"]
        np.testing.assert_allclose(phases["latency_ms"], total)


def test_it_embeds_and_is_timed_like_onnx_runtime(export, machine):
    runner = TensorRTRunner(export, machine=machine)
    assert (runner.backend, runner.precision) == ("tensorrt", "fp16")
    held_against_onnx_runtime(export, runner)


def int8_with_engines(tiny_run, folder, machine, settings=SETTINGS):
    return with_engines(shutil.copytree(tiny_run[0] / "export" / "int8", folder / "int8"), machine, settings)


def test_an_int8_export_runs_its_int8_engines(tiny_run, tmp_path, machine):
    runner = TensorRTRunner(int8_with_engines(tiny_run, tmp_path, machine), machine=machine)
    assert runner.precision == "int8-fp16"
    held_against_onnx_runtime(runner.model.folder, runner)


def test_a_batch_the_profile_does_not_include_is_refused(export, machine):
    with pytest.raises(ExportError, match=r"from \[1, 1\] to \[4, 24\], found \[32, 24\]"):
        TensorRTRunner(export, machine=machine).query("text", 32)


def test_an_engine_of_another_gpu_is_named_if_none_fits_this_gpu(export):
    with pytest.raises(
        ArtifactError, match=r"nvidia-l4\.trt10.*does not exist; found in its folder: image\.nvidia-h200"
    ):
        TensorRTRunner(export, machine=fake_machine(gpu="NVIDIA L4", capability=(8, 9)))


@pytest.mark.parametrize(
    ("machine_now", "batch", "words"),
    [
        ({}, 8, ["expected pixel_values from [1, 3, 32, 32] to [4, 3, 32, 32]", "found [8, 3, 32, 32]"]),
        (
            {"gpu": "NVIDIA L4", "capability": (8, 9)},
            2,
            ["nvidia-l4", "does not exist; found in its folder: image.nvidia-h200"],
        ),
    ],
)
def test_bench_refuses_a_batch_outside_the_profile_and_an_engine_of_another_gpu(
    tiny_run, tmp_path, machine, monkeypatch, machine_now, batch, words
):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    with_engines(run / "export" / "int8", machine, SETTINGS)
    monkeypatch.setattr(tensorrt, "find_machine", lambda: fake_machine(**machine_now))
    options = ("--stage", "int8", "--runner", "tensorrt", "--batch", batch, "--no-accuracy", "--duration", 0)
    result = clipress("bench", run, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert isinstance(result.exception, SystemExit) and not (tmp_path / "out").exists()
    for word in words:
        assert word in result.output, result.output


@pytest.fixture
def real():
    """Skip unless this machine has TensorRT and a GPU."""
    try:
        return find_machine()
    except BackendMissing as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_real_engine_agrees_and_runs(real, tmp_path, precision, cuda_graph):
    if cuda_graph and real.cuda.name == "pycuda":
        pytest.skip("PyCUDA has no CUDA graphs")
    settings = TensorRTSettings(precision=precision, batch={"opt": 2, "max": 4}, optimization_level=0)
    export = export_with_engines(tmp_path, real, settings)
    held_against_onnx_runtime(export, TensorRTRunner(export, precision, cuda_graph, real))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_real_int8_engine_agrees_and_runs(real, tiny_run, tmp_path, precision):
    settings = TensorRTSettings(precision=precision, batch={"opt": 2, "max": 4}, optimization_level=0)
    export = int8_with_engines(tiny_run, tmp_path, real, settings)
    held_against_onnx_runtime(export, TensorRTRunner(export, precision, machine=real))
