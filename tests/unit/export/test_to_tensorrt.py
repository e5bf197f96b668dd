"""Engines: calls that TensorRT 10 and 11 both have, sidecars, refusals, and messages of machines without TensorRT."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from fake_tensorrt import VERSIONS, fake_machine, fake_tensorrt, product, two_inputs
from helpers import clipress, write_recipe

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import ArtifactError, BackendMissing, ExportError, RecipeError
from clipress.export import merge, metadata, parity
from clipress.export.settings import ExportSettings, OnnxSettings, TensorRTSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.export.to_tensorrt import engine_from_onnx, engines_from_export, prepare, prepare_export
from clipress.export.trtexec import write_script
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.recipe import checked, overridden
from clipress.runtime import cuda
from clipress.runtime import tensorrt as machines
from clipress.runtime.export_folder import read_export
from clipress.runtime.tensorrt import load_engine, read_sidecar

ALL = {
    "precision": "fp16",
    "batch": {"min": 1, "opt": 4, "max": 6},
    "sparse_weights": True,
    "optimization_level": 5,
    "workspace_mib": 256,
    "version_compatible": True,
    "hardware_compatibility": "ampere_plus",
}


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="scenes", split="test", limit=10)])


@pytest.fixture(scope="module")
def original(tmp_path_factory, sets):
    folder = tmp_path_factory.mktemp("run")
    model = new_model(tiny_architecture(layers=1), 0)
    artifact = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), folder / "x")
    onnx_from_artifact(artifact, folder / "export" / "x", OnnxSettings(exporter="torchscript"), sets)
    return folder / "export" / "x"


@pytest.fixture
def export(original, tmp_path):
    """A copy of an export folder, which a test may change."""
    import shutil

    return shutil.copytree(original, tmp_path / "export" / "x")


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_normal((8, 5)).astype("f")


@pytest.fixture
def foreign(tmp_path, weight):
    onnx.save(product(weight), tmp_path / "linear.onnx")
    return tmp_path / "linear.onnx"


def built(foreign, machine, **settings):
    settings = TensorRTSettings(**{"precision": "fp32", **settings})
    return engine_from_onnx(prepare(foreign, foreign.parent, settings, foreign=True), machine, settings)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_build_makes_only_calls_that_the_release_documents(export, sets, version):
    machine = fake_machine(version)
    settings = TensorRTSettings(**ALL)
    engines_from_export(export, prepare_export(export, settings), machine, settings, sets)
    trt, calls = machine.trt, machine.trt.calls
    strongly = 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert strongly == {"10": 2, "11": 1}[version[:2]]  # The numbers changed with the release.
    assert [call for call in calls if call[0] == "Builder.create_network"] == [("Builder.create_network", strongly)] * 2
    assert [call[1].name for call in calls if call[0] == "IBuilderConfig.set_flag"] == [
        "SPARSE_WEIGHTS",
        "VERSION_COMPATIBLE",
    ] * 2
    assert [call[1:] for call in calls if call[0] == "IOptimizationProfile.set_shape"] == [
        ("pixel_values", (1, 3, 32, 32), (4, 3, 32, 32), (6, 3, 32, 32)),
        ("input_ids", (1, 1), (4, 16), (6, 24)),
    ]
    assert ("IBuilderConfig.set_memory_pool_limit", trt.MemoryPoolType.WORKSPACE, 256 << 20) in calls
    assert ("IBuilderConfig.builder_optimization_level", 5) in calls
    assert ("IBuilderConfig.hardware_compatibility_level", trt.HardwareCompatibilityLevel.AMPERE_PLUS) in calls
    assert ("Runtime.engine_host_code_allowed", True) in calls


@pytest.mark.parametrize("version", VERSIONS)
def test_the_only_default_flag_allows_sparse_weights(foreign, version):
    machine = fake_machine(version)
    built(foreign, machine)
    names = [call[0] for call in machine.trt.calls]
    assert [c[1].name for c in machine.trt.calls if c[0] == "IBuilderConfig.set_flag"] == ["SPARSE_WEIGHTS"]
    assert "IBuilderConfig.set_memory_pool_limit" not in names


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_of_11_has_no_precision_flags_and_fakes_refuse_unknown_names(version):
    trt = fake_machine(version).trt
    assert hasattr(trt.BuilderFlag, "FP16") == version.startswith("10")
    builder = trt.Builder(machines.new_log(trt))
    for wrong in ("platform_has_fast_bf16", "build_engine"):
        with pytest.raises(AttributeError):
            getattr(builder, wrong)
    with pytest.raises(AttributeError):
        builder.create_builder_config().max_workspace_size = 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_of_both_graphs_agree_with_onnx_runtime_and_are_kept_with_sidecars(export, sets, precision):
    machine = fake_machine()
    settings = TensorRTSettings(precision=precision, batch={"min": 2, "opt": 4, "max": 4})
    prepared = prepare_export(export, settings)
    paths = engines_from_export(export, prepared, machine, settings, sets)
    assert paths["image"].name == f"image.nvidia-h200.trt10.12.0.36.{precision}.engine"
    for tower, path in paths.items():
        sidecar = read_sidecar(path)
        exported = json.loads((export / "export.json").read_text())
        assert sidecar.onnx_sha256 == exported["files"][tower]["sha256"]
        assert (sidecar.tower, sidecar.precision, sidecar.gpu) == (tower, precision, "NVIDIA H200")
        assert sidecar.model["tokenizer"] == exported["tokenizer"] and sidecar.model["tower"] == tower
        assert sidecar.parity[f"{tower}_min_cosine"] > 0.9999 and sidecar.parity["same_first_place"] == 1
        assert path.with_name(path.name + ".log").is_file()
        engine = load_engine(path, machine)
        batch = read_export(export).graphs[tower].example(7)
        assert {name: rows.shape for name, rows in engine(batch).items()} == {
            f"{tower}_embeds": (7, exported["embed_dim"])
        }
    before = len(machine.trt.calls)
    assert engines_from_export(export, prepared, machine, settings, sets) == paths
    assert len(machine.trt.calls) == before  # Existing engines were kept.


def test_an_engine_computes_the_same_as_its_file_for_any_number_of_rows(foreign, weight):
    machine = fake_machine()
    engine = load_engine(built(foreign, machine, batch={"min": 2, "opt": 4, "max": 4}), machine)
    x = np.random.default_rng(1).standard_normal((9, 8)).astype("f")
    for rows in (1, 2, 4, 5, 9):
        np.testing.assert_allclose(engine({"x": x[:rows]})["y"], x[:rows] @ weight, rtol=1e-5)


def test_a_query_copies_in_runs_copies_out_and_then_waits(foreign):
    machine = fake_machine()
    query = load_engine(built(foreign, machine), machine).query({"x": np.ones((3, 8), "f")})
    machine.cuda.order.clear()
    query()
    assert machine.cuda.order == ["upload", "enqueue", "download", "wait"]
    assert query.phases() == {"h2d_ms": 1, "compute_ms": 1, "d2h_ms": 1, "latency_ms": 3}


def test_a_graph_is_recorded_after_a_plain_run(foreign):
    machine = fake_machine()
    engine = load_engine(built(foreign, machine), machine)
    machine.cuda.order.clear()
    engine.query({"x": np.ones((3, 8), "f")}, cuda_graph=True)
    assert machine.cuda.order == ["upload", "enqueue", "download", "wait", "capture"]


@pytest.mark.parametrize("shape", [(0, 8), (65, 8), (2, 9), (2,)])
def test_a_batch_outside_the_profile_is_refused(foreign, shape):
    machine = fake_machine()
    with pytest.raises(ExportError, match=r"expected x from \[1, 8\] to \[64, 8\], found .*export\.tensorrt\.batch"):
        load_engine(built(foreign, machine), machine).query({"x": np.ones(shape, "f")})


@pytest.mark.parametrize("damage", [0.2, np.nan])
def test_an_engine_that_fails_parity_is_not_kept(export, sets, damage):
    machine = fake_machine()
    machine.trt.damage = damage
    settings = TensorRTSettings(precision="fp32")
    with pytest.raises(ExportError, match=r"image\.nvidia-h200.*does not agree.*least cosine"):
        engines_from_export(export, prepare_export(export, settings), machine, settings, sets)
    left = {path.name for path in (export / "tensorrt").iterdir()}
    assert not [name for name in left if name.endswith((".engine", ".json"))]
    assert "image.nvidia-h200.trt10.12.0.36.fp32.engine.log" in left


def test_the_builders_log_is_kept_and_its_sparse_layers_are_counted(foreign):
    machine = fake_machine()
    machine.trt.log = [
        "(Sparsity) Layers eligible for sparse math: a, b, c",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: b",
        "Total Activation Memory: 512 bytes",
    ]
    path = built(foreign, machine)
    assert read_sidecar(path).sparse_layers == {"eligible": 3, "picked": 1}
    assert path.with_name(path.name + ".log").read_text().splitlines() == [
        "[VERBOSE] (Sparsity) Layers eligible for sparse math: a, b, c",
        "[VERBOSE] (Sparsity) TRT inference plan picked sparse implementation for layers: b",
        "[INFO] Total Activation Memory: 512 bytes",
    ]


def test_a_file_that_tensorrt_cannot_parse_is_refused_with_the_parsers_error_and_the_log(foreign):
    machine = fake_machine()
    machine.trt.parses = False
    with pytest.raises(ExportError, match=r"could not build .*UNSUPPORTED_NODE.*The whole log: .*engine\.log"):
        built(foreign, machine)
    (log,) = foreign.parent.glob("*.log")
    assert "importErf" in log.read_text()


def test_timings_are_kept_for_the_next_build_and_another_releases_are_not_used(foreign, tmp_path):
    attached = lambda machine: [c[1:] for c in machine.trt.calls if c[0] == "IBuilderConfig.set_timing_cache"]  # noqa: E731
    cache = tmp_path / "timings"
    machine = fake_machine()
    built(foreign, machine, timing_cache=cache)
    assert attached(machine) == [(b"", False)] and cache.read_bytes() == b"timings of 10.12.0.36"
    machine = fake_machine()
    built(foreign, machine, timing_cache=cache, optimization_level=4)
    assert attached(machine) == [(b"timings of 10.12.0.36", False)]
    machine = fake_machine(VERSIONS[1])
    path = built(foreign, machine, timing_cache=cache)
    assert attached(machine) == [(b"timings of 10.12.0.36", False), (b"", False)]
    assert "its timings are not used" in path.with_name(path.name + ".log").read_text()


def test_timings_are_kept_in_the_users_cache_by_gpu_and_release(foreign, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "cache"))
    built(foreign, fake_machine())
    (kept,) = (tmp_path / "cache" / "tensorrt").iterdir()
    assert kept.name == "timings.nvidia-h200.trt10.12.0.36.all.cache"


def test_a_plan_without_a_sidecar_is_not_loaded(foreign):
    machine = fake_machine()
    path = built(foreign, machine)
    path.with_name(path.name + ".json").unlink()
    machine.trt.calls.clear()
    with pytest.raises(ArtifactError, match=r"no .*engine\.json.*executable code"):
        load_engine(path, machine)
    assert machine.trt.calls == []


def test_a_plan_that_was_changed_is_not_loaded(foreign):
    machine = fake_machine()
    path = built(foreign, machine)
    path.write_bytes(path.read_bytes() + b"x")
    machine.trt.calls.clear()
    with pytest.raises(ArtifactError, match=r"truncated or changed.*sidecar"):
        load_engine(path, machine)
    assert machine.trt.calls == []


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 2}', "{}"])
def test_a_damaged_sidecar_is_refused(foreign, content):
    machine = fake_machine()
    path = built(foreign, machine)
    path.with_name(path.name + ".json").write_text(content)
    with pytest.raises(ArtifactError, match=r"engine\.json.*not loaded"):
        load_engine(path, machine)


H100, A100, T4 = ("NVIDIA H100", (9, 0)), ("NVIDIA A100", (8, 0)), ("Tesla T4", (7, 5))


@pytest.mark.parametrize(
    ("settings", "version", "gpu", "fits"),
    [
        ({}, VERSIONS[0], ("NVIDIA H200", (9, 0)), True),
        ({}, VERSIONS[1], ("NVIDIA H200", (9, 0)), False),
        ({}, VERSIONS[0], H100, False),
        ({"version_compatible": True}, VERSIONS[1], ("NVIDIA H200", (9, 0)), True),
        ({"version_compatible": True}, VERSIONS[1], H100, False),
        ({"hardware_compatibility": "same_compute_capability"}, VERSIONS[0], H100, True),
        ({"hardware_compatibility": "same_compute_capability"}, VERSIONS[0], A100, False),
        ({"hardware_compatibility": "ampere_plus"}, VERSIONS[0], A100, True),
        ({"hardware_compatibility": "ampere_plus"}, VERSIONS[0], T4, False),
        ({"hardware_compatibility": "ampere_plus"}, VERSIONS[1], A100, False),
    ],
)
def test_an_engine_runs_on_its_machine_and_is_refused_elsewhere_with_both_named(foreign, settings, version, gpu, fits):
    path = built(foreign, fake_machine(VERSIONS[0]), **settings)
    here = fake_machine(version, gpu=gpu[0], capability=gpu[1])
    if fits:
        assert load_engine(path, here)({"x": np.ones((2, 8), "f")})["y"].shape == (2, 5)
        return
    with pytest.raises(ArtifactError) as error:
        load_engine(path, here)
    assert "is for TensorRT 10.12.0.36 on NVIDIA H200 (compute capability 9.0)" in str(error.value)
    assert f"this is TensorRT {version} on {gpu[0]}" in str(error.value)
    assert here.trt.calls == []


def test_an_older_release_does_not_load_a_newer_ones_version_compatible_engine(foreign):
    path = built(foreign, fake_machine(VERSIONS[1]), version_compatible=True)
    with pytest.raises(ArtifactError, match="is for TensorRT 11"):
        load_engine(path, fake_machine(VERSIONS[0]))


def test_a_changed_file_or_setting_is_built_again(foreign, weight):
    machine = fake_machine()
    builds = lambda: [c[0] for c in machine.trt.calls].count("Builder.build_serialized_network")  # noqa: E731
    built(foreign, machine)
    built(foreign, machine)
    assert builds() == 1
    built(foreign, machine, batch={"max": 65})
    assert builds() == 2
    onnx.save(product(weight * 2), foreign)
    built(foreign, machine, batch={"max": 65})
    assert builds() == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_file_in_another_precision_keeps_its_metadata(export, tmp_path, precision):
    settings = TensorRTSettings(precision=precision)
    one = prepare(export / "text.onnx", tmp_path, settings)
    assert one.path == tmp_path / f"text.{precision}.onnx"
    kept = {item.key: item.value for item in onnx.load(one.path).metadata_props}
    about = {key: value for key, value in one.model.items() if key != "self_test"}  # The self-test is the source's.
    assert json.loads(kept["clipress"]) == {**about, "precision": precision} and one.model["tower"] == "text"


def test_a_file_of_another_tool_requires_the_option_foreign(foreign):
    with pytest.raises(ExportError, match=r"linear\.onnx was not made by clipress.*--foreign"):
        prepare(foreign, foreign.parent, TensorRTSettings())
    assert prepare(foreign, foreign.parent, TensorRTSettings(), foreign=True).name == "linear"


@pytest.fixture
def question(tmp_path, weight):
    """A file of a graph with two inputs that gives logits."""
    model = two_inputs(weight)
    metadata.stamp(model, {"task": "questions", "tower": "question", "agrees": "logits", "precision": "fp32"})
    onnx.save(model, tmp_path / "question.onnx")
    return tmp_path / "question.onnx"


def test_an_engine_of_two_inputs_has_a_profile_for_each_and_agrees(question, weight):
    machine, settings = fake_machine(), TensorRTSettings(precision="fp32", batch={"min": 2, "opt": 4, "max": 4})
    prepared = prepare(question, question.parent, settings)
    path = engine_from_onnx(prepared, machine, settings)
    shapes = [call[1:] for call in machine.trt.calls if call[0] == "IOptimizationProfile.set_shape"]
    assert shapes == [("states", (2, 8), (4, 8), (4, 8)), ("memory", (2, 5), (4, 5), (4, 5))]
    sidecar = read_sidecar(path)
    assert sidecar.tower == "question" and sidecar.profiles == prepared.profiles
    assert sidecar.parity == {"question_min_cosine": pytest.approx(1), "question_same_first_place": 1}
    engine, inputs = load_engine(path, machine), prepared.graph.example(9)
    for rows in (1, 2, 4, 5, 9):
        part = {name: values[:rows] for name, values in inputs.items()}
        (found,) = engine(part).values()
        np.testing.assert_allclose(found, part["states"] @ weight + part["memory"], rtol=1e-4, atol=1e-5)
    machine.cuda.order.clear()
    engine.query(prepared.graph.example(3))()
    assert machine.cuda.order == ["upload", "upload", "enqueue", "download", "wait"]
    script = write_script(question.parent / "trtexec.sh", [prepared], settings).read_text()
    assert "--maxShapes=states:4x8,memory:4x5" in script


def test_logits_with_another_first_place_are_refused(question, monkeypatch):
    monkeypatch.setattr(parity, "same_class", lambda *_: 0.5)
    settings = TensorRTSettings(precision="fp32")
    with pytest.raises(ExportError, match=r"question\..*engine ranks differently.*50\.0%"):
        engine_from_onnx(prepare(question, question.parent, settings), fake_machine(), settings)


def test_a_file_with_a_batch_per_input_is_refused(export, tmp_path):
    model = merge.joint({side: onnx.load(export / f"{side}.onnx") for side in ("image", "text")}, 10.0, None)
    onnx.save(model, tmp_path / "joint.onnx")
    with pytest.raises(ExportError, match="expected one batch for all inputs, found image_batch, text_batch"):
        prepare(tmp_path / "joint.onnx", tmp_path, TensorRTSettings(), foreign=True)


def test_an_input_of_another_type_is_refused(tmp_path, weight):
    model = product(weight)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, tmp_path / "wide.onnx")
    with pytest.raises(ExportError, match="expected inputs of float32 or int64, found x of double"):
        prepare(tmp_path / "wide.onnx", tmp_path, TensorRTSettings(), foreign=True)


def test_a_sidecar_of_an_earlier_version_is_read(foreign):
    path = built(foreign, fake_machine())
    file = path.with_name(path.name + ".json")
    earlier = json.loads(file.read_text())
    earlier["profile"] = earlier.pop("profiles")["x"]
    file.write_text(json.dumps(earlier))
    assert load_engine(path, fake_machine())({"x": np.ones((2, 8), "f")})["y"].shape == (2, 5)
    assert read_sidecar(path).profile.max == (64, 8)


def test_nan_weights_are_refused_by_name(tmp_path):
    weight = np.ones((8, 5), "f")
    weight[2, 3] = np.nan
    onnx.save(product(weight), tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match=r"1 of the 40 values of w are not numbers"):
        prepare(tmp_path / "bad.onnx", tmp_path, TensorRTSettings(), foreign=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.onnx"]


def test_a_file_that_is_not_onnx_or_has_more_dynamic_dimensions_is_refused(tmp_path, weight):
    (tmp_path / "note.onnx").write_text("dear diary")
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        prepare(tmp_path / "note.onnx", tmp_path, TensorRTSettings())
    with pytest.raises(ArtifactError, match="no such file"):
        prepare(tmp_path / "gone.onnx", tmp_path, TensorRTSettings())
    model = product(weight)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "n"
    onnx.save(model, tmp_path / "wide.onnx")
    with pytest.raises(ExportError, match="x is dynamic in more than"):
        prepare(tmp_path / "wide.onnx", tmp_path, TensorRTSettings(), foreign=True)


def test_settings_are_checked_with_the_recipe():
    with pytest.raises(RecipeError, match=r"export\.tensorrt\.batch: .*expected min <= opt <= max.*8, 4"):
        checked(ExportSettings, {"tensorrt": {"batch": {"opt": 8, "max": 4}}}, "export")
    with pytest.raises(RecipeError, match="unknown key 'fp16'"):
        checked(ExportSettings, {"tensorrt": {"fp16": True}}, "export")
    with pytest.raises(RecipeError, match=r"export\.tensorrt\.precision.*'int8'"):
        checked(ExportSettings, {"tensorrt": {"precision": "int8"}}, "export")
    assert checked(ExportSettings, {"tensorrt": ALL}, "export").tensorrt.batch.max == 6


@pytest.mark.parametrize("value", [{}, {"tensorrt": {}}, 3])
def test_targets_are_given_by_their_own_names(value):
    with pytest.raises(RecipeError, match=r"export\.targets: unknown key 'targets'"):
        checked(ExportSettings, {"targets": value}, "export")


@pytest.mark.parametrize("raw", [{}, {"tensorrt": None, "onnx": {"opset": 19}}, {"tensorrt": ALL}])
def test_the_section_reads_back_what_it_writes(raw):
    section = checked(ExportSettings, raw, "export")
    for mode in ("python", "json"):
        assert checked(ExportSettings, section.model_dump(mode=mode), "export") == section
    assert overridden(section, {"onnx": {"opset": 20}}, "export").targets == section.targets


def without_gpu(monkeypatch):
    def fails(self):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(cuda.TorchCuda, "__init__", fails)
    monkeypatch.setattr(cuda.PyCuda, "__init__", fails)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(machines, "open_cuda", lambda: fake_machine().cuda)


def test_a_machine_without_tensorrt_and_gpu_reports_both_and_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # As if it were not installed.
    without_gpu(monkeypatch)
    with pytest.raises(BackendMissing) as error:
        machines.find_machine()
    message = str(error.value)
    assert "pip install 'clipress[tensorrt]'" in message and "nvidia-smi" in message
    assert message.count("Found no NVIDIA driver") == 2  # One per library.


def test_libraries_that_do_not_load_are_one_message(monkeypatch, tmp_path, gpu):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendMissing, match=r"libraries do not load \(libnvinfer\.so\.10: .*pip install"):
        machines.find_machine()


@pytest.mark.parametrize("number", [35, 100])
def test_cuda_errors_of_the_runtime_are_the_same_message(monkeypatch, gpu, number):
    trt = fake_tensorrt(VERSIONS[0], None)
    trt.fail = f"CUDA initialization failure with error: {number}. Please check your CUDA installation"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(BackendMissing, match=rf"no usable GPU .*error: {number}.*nvidia-smi"):
        machines.find_machine()


def test_a_release_that_is_too_old_is_refused(monkeypatch, gpu):
    trt = fake_tensorrt(VERSIONS[0], None)
    trt.__version__ = "8.6.1"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(BackendMissing, match=r"TensorRT 8\.6\.1 is installed, 10\.12 or later is required"):
        machines.find_machine()


def test_a_machine_with_tensorrt_and_a_gpu_is_accepted(monkeypatch, gpu):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(VERSIONS[1], None))
    assert str(machines.find_machine()) == "TensorRT 11.4.0.106 on NVIDIA H200 (compute capability 9.0)"


@pytest.fixture
def bare(monkeypatch):
    """A machine without TensorRT and GPU, also where the tests run on one with both."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    without_gpu(monkeypatch)


def test_a_run_with_engines_in_its_recipe_continues_without_them_and_reports_why(tmp_path, recipe, tiny_run, bare):
    import shutil

    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(run / "triton")
    recipe["export"]["tensorrt"] = {"batch": {"max": 16}}
    kept = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(kept.replace("export:\n", "export:\n  tensorrt:\n    batch:\n      max: 16\n"))
    result = clipress("export", run, "--stage", "int8")
    assert result.exit_code == 0, result.output
    assert "Skipping export target tensorrt: TensorRT cannot be used on this machine" in result.output
    assert (run / "export" / "int8" / "tensorrt" / "image.int8-fp16.onnx").is_file()
    assert "--maxShapes=pixel_values:16x3x32x32" in (run / "export" / "trtexec.sh").read_text()
    result = clipress("export", run, "--stage", "int8", "--tensorrt")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "pip install 'clipress[tensorrt]'" in result.output


def test_a_whole_run_is_not_stopped_by_missing_engines(tmp_path, recipe, bare):
    recipe["stages"], recipe["export"]["tensorrt"] = [], {}
    result = clipress("run", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Skipping export target tensorrt: TensorRT cannot be used" in result.output
    assert (tmp_path / "run" / "bench" / "results.json").is_file() and (tmp_path / "run" / "triton").is_dir()


def test_the_command_for_one_file_reports_problems_with_it(tmp_path, foreign, export, bare):
    for arguments, words in [
        ((foreign, "--tensorrt"), "was not made by clipress"),
        ((foreign, "--tensorrt", "--foreign"), "TensorRT cannot be used"),
        ((export / "image.onnx",), "To build its TensorRT engine"),
        ((export / "image.onnx", "--tensorrt"), "TensorRT cannot be used"),
        ((tmp_path, "--foreign"), "require --tensorrt"),
        ((tmp_path / "gone.onnx", "--tensorrt"), "no such file"),
    ]:
        result = clipress("export", *arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        assert words in result.output, result.output


def test_the_command_builds_engines_on_a_machine_with_a_gpu(monkeypatch, export):
    machine = fake_machine(VERSIONS[1])
    monkeypatch.setattr("clipress.workflow.engines.find_machine", lambda: machine)
    result = clipress("export", export / "text.onnx", "--tensorrt", "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert "fp32 engine, matches ONNX Runtime (minimum cosine 1.0000" in result.output
    (path,) = export.glob("text.*.engine")
    assert read_sidecar(path).tensorrt == VERSIONS[1]


TRTEXEC = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{release}] [b36] # trtexec"
echo "$@" >> "$CALLS"
"""


@pytest.mark.parametrize(
    ("release", "has", "lacks"),
    [
        ("101200", ["--stronglyTyped", "--useCudaGraph", "--useSpinWait"], ["--includeDataTransfers"]),
        ("110400", ["--includeDataTransfers"], ["--stronglyTyped", "--useCudaGraph", "--useSpinWait"]),
    ],
)
def test_the_script_gives_both_releases_of_trtexec_the_same_options(export, tmp_path, release, has, lacks):
    settings = TensorRTSettings(**ALL)
    script = write_script(tmp_path / "export" / "trtexec.sh", list(prepare_export(export, settings).values()), settings)
    tool = tmp_path / "trtexec"
    tool.write_text(TRTEXEC.format(release=release))
    tool.chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | {"TRTEXEC": str(tool), "CALLS": str(calls)}
    subprocess.run(["sh", script], check=True, cwd="/", env=environment, capture_output=True)
    _, image, text = calls.read_text().splitlines()
    for option in [*has, "--onnx=x/tensorrt/image.fp16.onnx", "--sparsity=enable", "--versionCompatible",
                   "--optShapes=pixel_values:4x3x32x32", "--shapes=pixel_values:4x3x32x32", "--memPoolSize=workspace:256M",
                   "--hardwareCompatibilityLevel=ampere+", "--builderOptimizationLevel=5"]:  # fmt: skip
        assert option in image.split(), image
    assert "--minShapes=input_ids:1x1 --optShapes=input_ids:4x16 --maxShapes=input_ids:6x24" in text
    assert not {*lacks, "--fp16", "--int8", "--bf16", "--best"} & set(image.split())
    assert (script.parent / "x" / "tensorrt" / "image.fp16.onnx").is_file()


def test_the_script_stops_at_an_unknown_release(export, tmp_path):
    settings = TensorRTSettings()
    script = write_script(tmp_path / "export" / "trtexec.sh", list(prepare_export(export, settings).values()), settings)
    done = subprocess.run(
        ["sh", script], env=os.environ | {"TRT_MAJOR": "8", "TRTEXEC": "false"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "found release 8" in done.stderr
