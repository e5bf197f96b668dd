"""Triton model repositories: what the server will read, and the python backend's model run without a server."""

import asyncio
import hashlib
import importlib.util
import io
import json
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest
from asking import measured
from google.protobuf import json_format, text_format
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig

from clipress.data.transforms import fitted, normalised, open_image
from clipress.errors import ArtifactError, ExportError
from clipress.runtime.cpu import Processor
from clipress.runtime.export_folder import read_export
from clipress.serve import triton_config, triton_repo
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_config import server_options
from clipress.serve.triton_repo import serve_version, served_version, triton_repo_from_export

SIZE, LENGTH, DIM, WORDS = 2, 3, 4, 10
TABLE = np.random.default_rng(0).standard_normal((WORDS, DIM)).astype(np.float32)


def save(path, nodes, takes, gives, weight):
    graph = helper.make_graph(nodes, "tower", [takes], [gives], [numpy_helper.from_array(weight, "weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def export(tmp_path):
    """An export folder whose image tower is linear and whose text tower averages rows of TABLE."""
    folder = tmp_path / "run" / "export" / "int8"
    folder.mkdir(parents=True)
    save(
        folder / "image.onnx",
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weight"], ["image_embeds"]),
        ],
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]),
        helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", DIM]),
        np.ones((3 * SIZE * SIZE, DIM), np.float32),
    )
    save(
        folder / "text.onnx",
        [
            helper.make_node("Gather", ["weight", "input_ids"], ["words"]),
            helper.make_node("ReduceMean", ["words"], ["text_embeds"], axes=[1], keepdims=0),
        ],
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", LENGTH]),
        helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["batch", DIM]),
        TABLE,
    )
    files = {
        tower: {
            "file": f"{tower}.onnx",
            "sha256": hashlib.sha256((folder / f"{tower}.onnx").read_bytes()).hexdigest(),
        }
        for tower in ("image", "text")
    }
    described = {
        "schema_version": 1,
        "stage": "int8",
        "precision": "int8",
        "portable": True,
        "embed_dim": DIM,
        "logit_scale": 20.590953826904297,
        "preprocess": {"size": SIZE, "mean": [0.5, 0.25, 0.75], "std": [0.5, 0.5, 1.0]},
        "tokenizer": {"name": "clip-bpe", "context_length": LENGTH, "kwargs": {"clean": 'lower "ä"'}},
        "lineage_hash": "0123456789abcdef",
        "files": files,
        "opset": 17,
    }
    (folder / "export.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def config_in(repository, model):
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, ModelConfig())


def without_parameters(config):
    kept = {key: value.string_value for key, value in config.parameters.items()}
    config.ClearField("parameters")
    return config, kept


MODELS = {"image_encoder", "text_encoder", "preprocess", "tokenize", "embed_image", "embed_text", "classify"}


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_each_backend_gets_a_repository_of_all_models(export, tmp_path):
    target = tmp_path / "run" / "triton"
    assert triton_repo_from_export(export, target, ServeSettings()) == [target / "onnxruntime", target / "python"]
    both = {
        "README.md",
        "preprocess/warmup/picture",
        "tokenize/warmup/text",
        *(f"{model}/{file}" for model in MODELS for file in ("config.pbtxt", "1/release.json")),
        *(f"{model}/1/model.py" for model in ("preprocess", "tokenize", "classify")),
        *(f"{tower}_encoder/1/model.onnx" for tower in ("image", "text")),
    }
    assert files_in(target / "onnxruntime") == both
    assert files_in(target / "python") == both | {
        *(f"{tower}_encoder/1/model.py" for tower in ("image", "text")),
        *(f"embed_{tower}/1/{file}" for tower in ("image", "text") for file in ("model.py", "model.onnx")),
    }
    for tower in ("image", "text"):
        copied = target / "onnxruntime" / f"{tower}_encoder" / "1" / "model.onnx"
        assert copied.read_bytes() == (export / f"{tower}.onnx").read_bytes()


def test_only_the_backend_that_is_asked_for_is_written(export, tmp_path):
    settings = ServeSettings(backend=("python", "python"))
    assert triton_repo_from_export(export, tmp_path / "triton", settings) == [tmp_path / "triton" / "python"]
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["python"]


def test_the_image_encoder_is_described_as_triton_wants_it(export, tmp_path):
    settings = ServeSettings(backend="onnxruntime", max_batch=16, instances=1, threads=1)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    config, parameters = without_parameters(config_in(repository, "image_encoder"))
    expected = """
        name: "image_encoder"  backend: "onnxruntime"  max_batch_size: 16
        input [ { name: "pixel_values" data_type: TYPE_FP32 dims: [ 3, 2, 2 ] } ]
        output [ { name: "image_embeds" data_type: TYPE_FP32 dims: [ 4 ] } ]
        version_policy { latest { num_versions: 1 } }
        instance_group [ { kind: KIND_CPU count: 1 } ]
        dynamic_batching { }
        model_warmup [
          { name: "batch_1" batch_size: 1
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] random_data: true } } },
          { name: "batch_16" batch_size: 16
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] random_data: true } } }
        ]
    """
    assert config == text_format.Parse(expected, ModelConfig())
    assert parameters["intra_op_thread_count"] == "1"


def test_the_text_encoder_follows_the_settings(export, tmp_path):
    settings = ServeSettings(
        backend="python", max_batch=8, queue_delay_us=250, instances=3, threads=3, queue_size=9, queue_timeout_ms=7
    )
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    config, parameters = without_parameters(config_in(repository, "text_encoder"))
    expected = """
        name: "text_encoder"  backend: "python"  max_batch_size: 8
        input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ 3 ] } ]
        output [ { name: "text_embeds" data_type: TYPE_FP32 dims: [ 4 ] } ]
        version_policy { latest { num_versions: 1 } }
        instance_group [
          { kind: KIND_CPU count: 1 rate_limiter { priority: 1 } },
          { kind: KIND_CPU count: 2 rate_limiter { priority: 1000 } }
        ]
        dynamic_batching {
          max_queue_delay_microseconds: 250
          default_queue_policy { default_timeout_microseconds: 7000 allow_timeout_override: true max_queue_size: 9 } }
        model_warmup [
          { name: "batch_1" batch_size: 1
            inputs { key: "input_ids" value { data_type: TYPE_INT64 dims: [ 3 ] zero_data: true } } },
          { name: "batch_8" batch_size: 8
            inputs { key: "input_ids" value { data_type: TYPE_INT64 dims: [ 3 ] zero_data: true } } }
        ]
    """
    assert config == text_format.Parse(expected, ModelConfig())
    assert parameters["intra_op_thread_count"] == "3"


@pytest.mark.parametrize("model", ["image_encoder", "text_encoder"])
def test_a_client_finds_all_it_needs_in_the_parameters(export, tmp_path, model):
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="onnxruntime"))
    _, parameters = without_parameters(config_in(repository, model))
    assert float(parameters["logit_scale"]) == 20.590953826904297
    assert (parameters["lineage_hash"], parameters["precision"]) == ("0123456789abcdef", "int8")
    assert json.loads(parameters["preprocess"]) == {
        "size": 2,
        "mean": [0.5, 0.25, 0.75],
        "std": [0.5, 0.5, 1.0],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    assert json.loads(parameters["tokenizer"]) == {
        "name": "clip-bpe",
        "context_length": 3,
        "kwargs": {"clean": 'lower "ä"'},
    }


@pytest.mark.parametrize(
    ("portable", "isa", "asked", "level"),
    [(True, (), False, 0), (False, ("avx512_vnni",), True, 0), (False, (), True, -1)],
)
def test_weights_in_8_bits_are_served_exactly_where_they_would_overflow(
    export, tmp_path, monkeypatch, portable, isa, asked, level
):
    changed(export, precision="int8", portable=portable)
    monkeypatch.setattr(triton_config, "processor", lambda: Processor("A CPU", "x86_64", 2, isa))
    triton_repo_from_export(export, tmp_path / "triton", ServeSettings(backend=("onnxruntime", "python")))
    config = config_in(tmp_path / "triton" / "onnxruntime", "image_encoder")
    assert (config.parameters["session.x64quantprecision"].string_value == "1") is asked
    assert config.optimization.graph.level == level
    page = (tmp_path / "triton" / "onnxruntime" / "README.md").read_text(encoding="utf-8")
    assert ("serve such CPUs by the python backend" in page) is asked
    python = config_in(tmp_path / "triton" / "python", "image_encoder")  # its sessions know the CPU they are on
    assert "session.x64quantprecision" not in python.parameters and not python.optimization.HasField("graph")


@pytest.mark.parametrize(("small", "cached"), [(False, {"text_encoder"}), (True, {"text_encoder", "embed_text"})])
def test_only_what_encodes_texts_is_cached_and_only_where_that_is_asked_for(export, tmp_path, small, cached):
    bench = measured(tmp_path / "results.json", text=0.2 if small else 2)
    for mb in (0, 3):
        settings = ServeSettings(backend="python", text_cache_mb=mb, instances=1)
        (repository,) = triton_repo_from_export(export, tmp_path / str(mb), settings, bench)
        models = [path.parent.name for path in repository.glob("*/config.pbtxt")]
        found = {model for model in models if config_in(repository, model).response_cache.enable}
        assert found == (cached if mb else set())
        option = f"--cache-config=local,size={3 * 1024**2}"
        assert server_options(repository) == ([option] if mb else [])
        assert (option in (repository / "README.md").read_text()) == bool(mb)


def test_a_largest_batch_of_one_is_warmed_up_once(export, tmp_path):
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="python", max_batch=1))
    assert [warm_up.batch_size for warm_up in config_in(repository, "text_encoder").model_warmup] == [1]


def test_the_same_export_gives_the_same_bytes(export, tmp_path):
    first, second = (
        triton_repo_from_export(export, tmp_path / name, ServeSettings(backend="python"))[0] for name in ("a", "b")
    )
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_a_disk_that_fills_up_leaves_the_older_repository(export, tmp_path, monkeypatch):
    target = tmp_path / "triton"
    kept = target / "python" / "README.md"
    kept.parent.mkdir(parents=True)
    kept.write_text("older")
    real, copies = triton_repo.shutil.copyfile, []

    def full_at_the_third(source, copy):
        copies.append(copy)
        if len(copies) == 3:
            raise OSError(28, "No space left on device")
        return real(source, copy)

    monkeypatch.setattr(triton_repo.shutil, "copyfile", full_at_the_third)
    with pytest.raises(ArtifactError, match="No space left"):
        triton_repo_from_export(export, target, ServeSettings(backend="python"))
    assert [path.relative_to(target) for path in target.rglob("*") if path.is_file()] == [kept.relative_to(target)]


@pytest.mark.parametrize(
    "printed, told", [('name: "other"', "another configuration"), ("nme: 1", "cannot be read back")]
)
def test_a_configuration_that_does_not_read_back_is_not_written(export, tmp_path, monkeypatch, printed, told):
    monkeypatch.setattr(text_format, "MessageToString", lambda config: printed)
    with pytest.raises(ExportError, match=f"image_encoder.*{told}"):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings())
    assert list((tmp_path / "triton").glob("*")) == []


def test_a_missing_export_says_how_to_make_it(tmp_path):
    with pytest.raises(ArtifactError, match="clipress export RUN"):
        triton_repo_from_export(tmp_path / "export" / "int8", tmp_path / "triton", ServeSettings())
    assert not (tmp_path / "triton").exists()


def test_a_changed_onnx_file_is_not_served(export, tmp_path):
    (export / "text.onnx").write_bytes((export / "image.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"text\.onnx .* changed.*clipress export RUN"):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings())
    assert not (tmp_path / "triton").exists()


def test_the_readme_starts_the_server_its_backend_needs(export, tmp_path):
    pages = [
        (repository / "README.md").read_text(encoding="utf-8")
        for repository in triton_repo_from_export(export, tmp_path, ServeSettings(instances=1))
    ]
    for page in pages:
        assert re.search(r"FROM nvcr\.io/nvidia/tritonserver:24\.10-py3\nRUN pip install 'numpy<2' onnxruntime", page)
        body = json.loads(re.findall(r"-d '(.*)'", page)[2])
        assert np.asarray(body["inputs"][0]["data"]).reshape(body["inputs"][0]["shape"]).shape == (1, LENGTH)
        compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "README.md", "exec")
    assert [re.search(r"docker run .*\n  (.*)", page)[1] for page in pages] == [
        f"clipress-triton:24.10 tritonserver --model-repository=/models/{backend}"
        for backend in ("onnxruntime", "python")
    ]


def test_a_server_of_several_instances_is_told_which_comes_first(export, tmp_path):
    repository = python_repository(export, tmp_path, instances=2)
    assert server_options(repository) == ["--rate-limit=execution_count"]
    page = (repository / "README.md").read_text(encoding="utf-8")
    assert "--model-repository=/models/python --rate-limit=execution_count\n" in page


def changed(export, **described):
    """Change an export in place: other weights in the text tower, or what export.json says."""
    path = export / "export.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    if not described:
        model = onnx.load(export / "text.onnx")
        model.producer_version += "x"
        onnx.save(model, export / "text.onnx")
        told["files"]["text"]["sha256"] = hashlib.sha256((export / "text.onnx").read_bytes()).hexdigest()
    path.write_text(json.dumps({**told, **described}), encoding="utf-8")


def snapshot(repository):
    return {name: (repository / name).read_bytes() for name in files_in(repository)}


def python_repository(export, target, **settings):
    return triton_repo_from_export(export, target, ServeSettings(backend="python", **settings))[0]


def policies(repository):
    """What each model's version policy says; None: the newest."""
    configs = [config_in(repository, model) for model in MODELS]
    return {max(config.version_policy.specific.versions, default=None) for config in configs}


def test_an_export_that_has_not_changed_adds_nothing_and_touches_nothing(export, tmp_path):
    repository = python_repository(export, tmp_path)
    before, folder = snapshot(repository), repository.stat().st_ino
    assert snapshot(python_repository(export, tmp_path)) == before
    assert repository.stat().st_ino == folder  # a server or container that looks at it keeps what it sees


def test_what_a_server_leaves_in_a_version_is_no_change(export, tmp_path):
    left = python_repository(export, tmp_path) / "preprocess" / "1" / "__pycache__" / "model.cpython-311.pyc"
    left.parent.mkdir()
    left.write_bytes(b"compiled")
    assert not (python_repository(export, tmp_path) / "preprocess" / "2").exists()


def test_an_export_that_was_made_again_elsewhere_is_the_same(export, tmp_path):
    python_repository(export, tmp_path)
    changed(export, parity={"image_min_cosine": 0.5})
    elsewhere = tmp_path / "elsewhere"
    export.rename(elsewhere)
    assert not (python_repository(elsewhere, tmp_path) / "classify" / "2").exists()


def test_settings_that_change_are_written_without_a_new_version(export, tmp_path):
    python_repository(export, tmp_path)
    repository = python_repository(export, tmp_path, max_batch=3)
    assert {config_in(repository, f"{tower}_encoder").max_batch_size for tower in ("image", "text")} == {3}
    assert not (repository / "image_encoder" / "2").exists()


def test_a_changed_export_is_added_to_every_model_and_the_older_one_stays(export, tmp_path):
    first = snapshot(python_repository(export, tmp_path))
    changed(export)
    repository = python_repository(export, tmp_path)
    second = snapshot(repository)
    assert {name: second[name] for name in first if "/1/" in name} == {n: c for n, c in first.items() if "/1/" in n}
    assert {name.replace("/2/", "/1/") for name in second if "/2/" in name} == {n for n in first if "/1/" in n}
    assert second["text_encoder/2/model.onnx"] == (export / "text.onnx").read_bytes()
    assert second["text_encoder/2/model.onnx"] != second["text_encoder/1/model.onnx"]
    assert policies(repository) == {None}


def test_every_model_is_rolled_back_with_what_its_configuration_said_then(export, tmp_path):
    first = snapshot(python_repository(export, tmp_path))
    changed(export, logit_scale=7.0, lineage_hash="later")
    repository = python_repository(export, tmp_path)
    assert serve_version(repository, None, ServeSettings()) == 1
    assert policies(repository) == {1} and served_version(repository) == 1
    for model in MODELS:
        then = text_format.Parse(first[f"{model}/config.pbtxt"].decode(), ModelConfig())
        now = config_in(repository, model)
        now.version_policy.CopyFrom(then.version_policy)
        assert now == then
    assert serve_version(repository, 2, ServeSettings()) == 2
    assert policies(repository) == {None}
    assert config_in(repository, "classify").parameters["logit_scale"].string_value == "7.0"


def test_a_repository_stays_rolled_back_until_there_is_something_new(export, tmp_path):
    python_repository(export, tmp_path)
    changed(export)
    serve_version(python_repository(export, tmp_path), 1, ServeSettings())
    assert policies(python_repository(export, tmp_path, max_batch=5)) == {1}
    changed(export)
    repository = python_repository(export, tmp_path)
    assert policies(repository) == {None} and served_version(repository) == 3


@pytest.mark.parametrize("version, told", [(None, "An older version"), (3, "Version 3")])
def test_a_version_that_is_not_there_is_told_with_those_that_are(export, tmp_path, version, told):
    repository = python_repository(export, tmp_path)
    with pytest.raises(ArtifactError, match=rf"{told} .*versions there: 1\. Do: clipress serve RUN"):
        serve_version(repository, version, ServeSettings())
    with pytest.raises(ArtifactError, match="versions there: none"):
        serve_version(tmp_path / "nowhere", version, ServeSettings())


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"export": {}}'])
def test_a_version_whose_record_is_damaged_is_not_served(export, tmp_path, content):
    repository = python_repository(export, tmp_path)
    changed(export)
    repository, record = python_repository(export, tmp_path), repository / "image_encoder" / "1" / "release.json"
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    before = snapshot(repository)
    with pytest.raises(ArtifactError, match=r"1/release\.json.*clipress serve RUN"):
        serve_version(repository, 1, ServeSettings())
    assert snapshot(repository) == before


def test_a_model_that_takes_something_else_is_no_new_version(export, tmp_path):
    before = snapshot(python_repository(export, tmp_path))
    changed(export, preprocess={"size": 4})
    told = r"image_encoder .* takes pixel_values \[3, 2, 2\].*takes pixel_values \[3, 4, 4\].*new repository"
    with pytest.raises(ExportError, match=told):
        python_repository(export, tmp_path)
    assert snapshot(tmp_path / "python") == before


def test_pictures_and_texts_pass_through_what_prepares_them(export, tmp_path):
    repository = python_repository(export, tmp_path, max_batch=8)
    for tower, first, takes, between, dims in (
        ("image", "preprocess", "image", "pixel_values", [3, 2, 2]),
        ("text", "tokenize", "text", "input_ids", [3]),
    ):
        ensemble, prepares = config_in(repository, f"embed_{tower}"), config_in(repository, first)
        encoder = config_in(repository, f"{tower}_encoder")
        assert {config.max_batch_size for config in (ensemble, prepares, encoder)} == {8}
        assert (list(ensemble.input), list(ensemble.output)) == (list(prepares.input), list(encoder.output))
        assert (prepares.input[0].name, list(prepares.input[0].dims)) == (takes, [1])
        assert list(prepares.output[0].dims) == list(encoder.input[0].dims) == dims
        assert prepares.output[0].data_type == encoder.input[0].data_type
        steps = [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in ensemble.ensemble_scheduling.step]
        gives = f"{tower}_embeds"
        assert steps == [
            (first, {takes: takes}, {between: between}),
            (f"{tower}_encoder", {between: between}, {gives: gives}),
        ]
        assert not ensemble.instance_group and not ensemble.HasField("dynamic_batching")


def test_a_very_small_encoder_is_run_where_its_input_is_prepared(export, tmp_path):
    bench = measured(tmp_path / "results.json", image=0.9, text=1.1)
    settings = ServeSettings(backend=("python", "onnxruntime"), max_batch=8, instances=2)
    python, runtime = triton_repo_from_export(export, tmp_path, settings, bench)
    config, _ = without_parameters(config_in(python, "embed_image"))
    expected = """
        name: "embed_image"  backend: "python"  max_batch_size: 8
        input [ { name: "image" data_type: TYPE_STRING dims: [ 1 ] } ]
        output [ { name: "image_embeds" data_type: TYPE_FP32 dims: [ 4 ] } ]
        version_policy { latest { num_versions: 1 } }
        instance_group [
          { kind: KIND_CPU count: 1 rate_limiter { priority: 1 } },
          { kind: KIND_CPU count: 1 rate_limiter { priority: 1000 } }
        ]
        dynamic_batching { }
        model_warmup [ { name: "picture" batch_size: 1
            inputs { key: "image" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "picture" } } } ]
    """
    assert config == text_format.Parse(expected, ModelConfig())
    assert open_image((python / "embed_image" / "warmup" / "picture").read_bytes()[4:]).size == (SIZE, SIZE)
    assert config_in(python, "embed_text").platform == "ensemble"
    assert {config_in(runtime, f"embed_{tower}").platform for tower in ("image", "text")} == {"ensemble"}
    copies = [python / model / "1" / "model.onnx" for model in ("image_encoder", "embed_image")]
    assert copies[0].samefile(copies[1])


def test_new_figures_change_how_a_version_runs_and_make_no_new_one(export, tmp_path):
    settings = ServeSettings(backend="python", instances=1)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    triton_repo_from_export(export, tmp_path, settings, measured(tmp_path / "results.json", image=0.2))
    assert config_in(repository, "embed_image").backend == "python"
    assert policies(repository) == {None} and not (repository / "embed_image" / "2").exists()


def test_a_version_without_the_encoders_file_in_embed_stays_a_chain(export, tmp_path):
    """Versions were written so before very small encoders were run there."""
    bench = measured(tmp_path / "results.json", image=0.2, text=0.2)
    settings = ServeSettings(backend="python", instances=1)
    (repository,) = triton_repo_from_export(export, tmp_path, settings, bench)
    for path in repository.glob("*/1/release.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "fusible": False}), encoding="utf-8")
    changed(export)
    triton_repo_from_export(export, tmp_path, settings, bench)
    assert config_in(repository, "embed_text").backend == "python"
    assert serve_version(repository, None, settings, bench) == 1
    assert config_in(repository, "embed_text").platform == "ensemble"


def test_the_warm_up_is_a_picture_and_a_text_as_triton_stores_strings(export, tmp_path):
    repository = python_repository(export, tmp_path)
    for model, name in (("preprocess", "picture"), ("tokenize", "text")):
        (sample,) = config_in(repository, model).model_warmup
        (given,) = sample.inputs.values()
        assert given.input_data_file == name
        stored = (repository / model / "warmup" / name).read_bytes()
        assert int.from_bytes(stored[:4], "little") == len(stored) - 4
    assert open_image((repository / "preprocess" / "warmup" / "picture").read_bytes()[4:]).size == (SIZE, SIZE)
    assert (repository / "tokenize" / "warmup" / "text").read_bytes()[4:].decode() == "a photo of a cat"


def test_the_rate_limiter_gets_what_the_encoders_take(export, tmp_path):
    limit = {"resources": {"cores": 2}, "priority": 3}
    repository = python_repository(export, tmp_path, rate_limit=limit, instances=2)
    for model in MODELS - {"embed_image", "embed_text", "tokenize"}:
        groups = config_in(repository, model).instance_group
        limits = [[(resource.name, resource.count) for resource in group.rate_limiter.resources] for group in groups]
        assert limits == [[("cores", 2)] if "encoder" in model else []] * 2
        times = 3 if "encoder" in model else 1
        assert [group.rate_limiter.priority for group in groups] == [times, 1000 * times]
    assert "--rate-limit=execution_count" in (repository / "README.md").read_text(encoding="utf-8")


# --- engines ---


def engine(export, tower, gpu="nvidia-h200", trt="10.16.1.11", precision="fp16", **changes):
    """Put a plan and a sidecar that vouches for it into an export."""
    plan = export / "tensorrt" / f"{tower}.{gpu}.trt{trt}.{precision}.engine"
    plan.parent.mkdir(exist_ok=True)
    plan.write_bytes(f"plan of {plan.name}".encode())
    shape = (3, SIZE, SIZE) if tower == "image" else (LENGTH,)
    told = {
        "tower": tower,
        "precision": precision,
        "tensorrt": trt,
        "gpu": gpu,
        "compute_capability": (9, 0),
        "version_compatible": False,
        "hardware_compatibility": "none",
        "onnx_sha256": hashlib.sha256((export / f"{tower}.onnx").read_bytes()).hexdigest(),
        "plan_sha256": hashlib.sha256(plan.read_bytes()).hexdigest(),
        "profile": {"min": (1, *shape), "opt": (8, *shape), "max": (32, *shape)},
        "settings": {},
        "clipress": "0",
    }
    plan.with_name(f"{plan.name}.json").write_text(json.dumps(told | changes), encoding="utf-8")
    return plan


def test_engines_are_served_on_their_gpus_with_graphs_of_their_batches(export, tmp_path):
    plans = {tower: engine(export, tower) for tower in ("image", "text")}
    settings = ServeSettings(backend="tensorrt", gpus=(0, 2), instances=2)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    config, _ = without_parameters(config_in(repository, "image_encoder"))
    config.ClearField("model_warmup")
    expected = """
        name: "image_encoder"  backend: "tensorrt"  max_batch_size: 32
        default_model_filename: "model.plan"  cc_model_filenames { key: "9.0" value: "model.plan" }
        input [ { name: "pixel_values" data_type: TYPE_FP32 dims: [ 3, 2, 2 ] } ]
        output [ { name: "image_embeds" data_type: TYPE_FP32 dims: [ 4 ] } ]
        version_policy { latest { num_versions: 1 } }
        instance_group [ { kind: KIND_GPU count: 2 gpus: [ 0, 2 ] profile: ["0"] } ]
        dynamic_batching { }
        optimization { cuda { graphs: true output_copy_stream: true
          graph_spec [
            { batch_size: 1 input { key: "pixel_values" value { dim: [ 3, 2, 2 ] } } },
            { batch_size: 8 input { key: "pixel_values" value { dim: [ 3, 2, 2 ] } } },
            { batch_size: 32 input { key: "pixel_values" value { dim: [ 3, 2, 2 ] } } } ] } }
    """
    assert config == text_format.Parse(expected, ModelConfig())
    for tower, plan in plans.items():
        folder = repository / f"{tower}_encoder" / "1"
        assert (folder / "model.plan").read_bytes() == plan.read_bytes()
        assert files_in(folder) == {"model.plan", "model.plan.json", "release.json"}
    assert config_in(repository, "embed_text").max_batch_size == 32
    page = (repository / "README.md").read_text(encoding="utf-8")
    assert "--gpus all" in page and "TensorRT 10.16.1.11" in page


def test_each_kind_of_gpu_gets_its_engine_of_the_newest_tensorrt(export, tmp_path):
    for tower in ("image", "text"):
        engine(export, tower, trt="10.9.0.34")
        engine(export, tower, gpu="a100", compute_capability=(8, 0), profile={"min": [1], "opt": [4], "max": [16]})
        engine(export, tower)
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="tensorrt"))
    config = config_in(repository, "text_encoder")
    assert dict(config.cc_model_filenames) == {"8.0": "model.plan", "9.0": "model_cc90.plan"}
    assert (repository / "text_encoder" / "1" / "model_cc90.plan").read_bytes() == b"plan of " + (
        b"text.nvidia-h200.trt10.16.1.11.fp16.engine"
    )
    assert config.max_batch_size == 16


def test_an_engine_version_is_rolled_back_as_it_was(export, tmp_path):
    settings = ServeSettings(backend="tensorrt")
    for tower in ("image", "text"):
        engine(export, tower, profile={"min": [1], "opt": [2], "max": [4]})
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    for tower in ("image", "text"):
        engine(export, tower)
    triton_repo_from_export(export, tmp_path, settings)
    assert config_in(repository, "image_encoder").max_batch_size == 32
    serve_version(repository, 1, settings)
    assert config_in(repository, "image_encoder").max_batch_size == 4


@pytest.mark.parametrize(
    "made, told",
    [
        ([], "engines there: none. Build it .*clipress export RUN --tensorrt"),
        ([{"onnx_sha256": "0" * 64}], r"image\.onnx as it is now; engines there: image\.nvidia"),
        ([{}, {"precision": "bf16"}], "Say serve.precision"),
        ([{}, {"gpu": "nvidia-h100"}], "One engine per kind of GPU"),
        ([{"profile": {"min": [2], "opt": [2], "max": [2]}}], "takes 2 or more"),
    ],
    ids=["none", "of another export", "two precisions", "two of a kind", "no single rows"],
)
def test_where_no_engine_or_more_than_one_is_meant_nothing_is_written(export, tmp_path, made, told):
    engine(export, "text")
    for changes in made:
        engine(export, "image", **changes)
    with pytest.raises(ExportError, match=told):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings(backend="tensorrt"))
    assert not (tmp_path / "triton").exists()


def test_an_engine_that_its_sidecar_does_not_vouch_for_is_not_served(export, tmp_path):
    engine(export, "text")
    engine(export, "image").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"truncated or changed.*not loaded"):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings(backend="tensorrt"))


# --- an index to search ---


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Stands in for an index: a folder, and a module that opens it. Its vectors are the rows of TABLE."""
    folder = tmp_path / "index"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "0").write_bytes(b"vectors")

    class Index:
        dim, lineage = DIM, "0123456789abcdef"

        def search(self, queries, k):
            scores = queries @ TABLE.T
            order = np.argsort(-scores, axis=1)[:, :k]
            keys = [[f"käfer-{n}.png" for n in row] for row in order]
            return np.take_along_axis(scores, order, 1), keys

    module = ModuleType("clipress.serve.index")
    module.Index, module.open_index = Index, lambda folder: Index()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return folder


def test_an_index_travels_with_the_version_that_searches_it(export, index, tmp_path):
    repository = python_repository(export, tmp_path, index=index)
    assert (repository / "search" / "1" / "index" / "parts" / "0").read_bytes() == b"vectors"
    (index / "parts" / "0").write_bytes(b"others")
    repository = python_repository(export, tmp_path, index=index)
    assert [(repository / "search" / n / "index" / "parts" / "0").read_bytes() for n in "12"] == [b"vectors", b"others"]
    assert "`search`" in (repository / "README.md").read_text(encoding="utf-8")


def test_a_version_that_could_not_search_is_rolled_back_to_without_it(export, index, tmp_path):
    python_repository(export, tmp_path)
    repository = python_repository(export, tmp_path, index=index)
    assert (repository / "search" / "2").is_dir() and not (repository / "search" / "1").exists()
    serve_version(repository, 1, ServeSettings())
    assert not (repository / "search").exists()


@pytest.mark.parametrize("change", [{"lineage": "of another"}, {"dim": 5}])
def test_an_index_of_another_model_is_refused(export, index, tmp_path, monkeypatch, change):
    for name, value in change.items():
        monkeypatch.setattr(sys.modules["clipress.serve.index"].Index, name, value)
    with pytest.raises(ArtifactError, match=r"Index .* dimensions; int8 is 0123456789abcdef and has 4"):
        python_repository(export, tmp_path / "triton", index=index)
    assert not (tmp_path / "triton").exists()


def test_a_version_whose_index_is_gone_is_not_served(export, index, tmp_path):
    python_repository(export, tmp_path)
    repository = python_repository(export, tmp_path, index=index)
    serve_version(repository, 1, ServeSettings())
    with pytest.raises(ArtifactError, match=r"search/2.*clipress serve RUN"):
        serve_version(repository, 2, ServeSettings())
    assert (python_repository(export, tmp_path, index=index) / "search" / "3" / "index").is_dir()


# --- the python models, run without a server ---


class Tensor:
    """Stands in for pb_utils.Tensor, and for one input of a request."""

    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class Fault(str):
    """An error with its code, as Triton numbers them."""

    INTERNAL, INVALID_ARG, UNAVAILABLE = 1, 3, 4

    def __new__(cls, told, code):
        made = super().__new__(cls, told)
        made.code = code
        return made


class Response:
    def __init__(self, output_tensors=(), error=None):
        self.outputs, self.error = {tensor.name: tensor.array for tensor in output_tensors}, error


class Asked:
    """Stands in for a request to another model: an encoder that can be followed by hand."""

    log: ClassVar = []

    def __init__(self, model_name, requested_output_names, inputs, preferred_memory):
        self.model, self.gives, self.input = model_name, requested_output_names[0], inputs[0]

    async def async_exec(self):
        rows = self.input.as_numpy()
        Asked.log.append((self.model, len(rows)))
        bad = [row[0] for row in rows if row[0] == b"bad"]
        embeds = np.stack([by_hand(row[0]) for row in rows])
        return SimpleNamespace(
            has_error=lambda: bool(bad),
            error=lambda: SimpleNamespace(message=lambda: "in ensemble: bad"),
            outputs={self.gives: Tensor(self.gives, embeds)},
        )


def by_hand(content):
    vector = np.random.default_rng(list(content)).standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture
def python_backend(monkeypatch):
    """Triton's module for python models."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError, utils.InferenceRequest = Tensor, Response, Fault, Asked
    utils.PreferredMemory, utils.TRITONSERVER_MEMORY_CPU = (lambda kind, device: None), 0
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    utils.get_output_tensor_by_name = lambda response, name: response.outputs[name]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.delitem(sys.modules, "clipress.serve.triton_model", raising=False)
    monkeypatch.setattr(Asked, "log", [])


def started(repository, name):
    """A model, started the way Triton does."""
    spec = importlib.util.spec_from_file_location("model", repository / name / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = json_format.MessageToJson(config_in(repository, name), preserving_proto_field_name=True)
    model.initialize({"model_config": config})
    return model


@pytest.fixture
def text_model(export, tmp_path, python_backend):
    """The python backend's text encoder; `runs` holds each run's batch size."""
    model = started(python_repository(export, tmp_path, threads=2), "text_encoder")
    model.runs = []
    session, run = model.session, model.session.run

    class Counted:
        def run(self, names, feed):
            model.runs.append(len(feed["input_ids"]))
            return run(names, feed)

    assert session.get_session_options().intra_op_num_threads == 2
    model.session = Counted()
    return model


def request(*texts):
    return {"input_ids": Tensor("input_ids", np.asarray(texts, np.int64))}


def test_requests_that_come_together_are_one_run_and_are_answered_apart(text_model):
    alone, three = [[1, 2, 3]], [[4, 4, 4], [0, 9, 1], [7, 5, 2]]
    first, second = text_model.execute([request(*alone), request(*three)])
    assert text_model.runs == [4]
    for response, texts in ((first, alone), (second, three)):
        assert response.error is None
        by_hand = [(TABLE[a] + TABLE[b] + TABLE[c]) / 3 for a, b, c in texts]
        np.testing.assert_allclose(response.outputs["text_embeds"], by_hand, atol=1e-6)


def test_a_request_of_the_wrong_shape_is_answered_with_an_error(text_model):
    (response,) = text_model.execute([request([1, 2])])
    assert response.outputs == {}
    assert response.error.startswith("input_ids: ")


def test_one_bad_request_does_not_spoil_its_neighbours(text_model):
    good, bad, other = text_model.execute([request([1, 1, 1]), request([0, 0, WORDS]), request([2, 2, 2], [3, 3, 3])])
    np.testing.assert_allclose(good.outputs["text_embeds"], TABLE[[1]], atol=1e-6)
    np.testing.assert_allclose(other.outputs["text_embeds"], TABLE[[2, 3]], atol=1e-6)
    assert bad.outputs == {} and "Gather" in bad.error and bad.error.code == Fault.INVALID_ARG


def test_when_every_request_is_bad_each_gets_an_error_and_the_model_lives_on(text_model):
    responses = text_model.execute([request([1, 2]), request([0, 0, WORDS])])
    assert [bool(response.error) for response in responses] == [True, True]
    (after,) = text_model.execute([request([5, 5, 5])])
    np.testing.assert_allclose(after.outputs["text_embeds"], TABLE[[5]], atol=1e-6)


def test_a_model_that_is_unloaded_lets_go_of_its_session(text_model):
    text_model.finalize()
    assert text_model.session is None


def strings(**inputs):
    """A request of TYPE_STRING inputs."""
    return {name: Tensor(name, np.asarray(values, object)) for name, values in inputs.items()}


def png(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_pictures_are_prepared_together_and_a_bad_one_fails_its_request_alone(export, tmp_path, python_backend):
    model = started(python_repository(export, tmp_path), "preprocess")
    given = [[png(0)], [png(1), b"no picture"], [png(2), png(3)]]
    one, bad, two = model.execute([strings(image=[[file] for file in files]) for files in given])
    preprocess = read_export(export).preprocess
    for response, seeds in ((one, [0]), (two, [2, 3])):
        expected = [normalised(fitted(open_image(png(seed)), preprocess), preprocess) for seed in seeds]
        np.testing.assert_array_equal(response.outputs["pixel_values"], expected)
    assert bad.outputs == {} and "not a readable image" in bad.error
    (alone,) = model.execute([strings(image=[[b""]])])
    assert "not a readable image" in alone.error


def test_texts_are_tokenized_together_and_one_that_is_no_utf8_fails_its_request_alone(
    export, tmp_path, python_backend, monkeypatch
):
    seen = []

    def tokenizer_from_spec(spec):
        assert spec["context_length"] == LENGTH
        return lambda texts: seen.append(len(texts)) or np.asarray([[len(t), 0, 0] for t in texts], np.int64)

    monkeypatch.setattr("clipress.data.tokens.tokenizer_from_spec", tokenizer_from_spec)
    model = started(python_repository(export, tmp_path), "tokenize")
    given = [["käfer".encode()]], [[b"\xff"]], [[b"x" * 100_001]], [[b"a"], [b"cat"]]
    one, bad, long, two = model.execute([strings(text=texts) for texts in given])
    assert seen == [3]
    assert one.outputs["input_ids"].tolist() == [[5, 0, 0]]
    assert two.outputs["input_ids"].tolist() == [[1, 0, 0], [3, 0, 0]]
    assert "UTF-8" in bad.error and "100,001" in long.error


@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_is_prepared_and_encoded_in_one_process_is_what_two_models_make_of_it(
    export, tmp_path, python_backend, monkeypatch, tower
):
    monkeypatch.setattr("clipress.data.tokens.tokenizer_from_spec", lambda spec: lambda texts: ids(texts))
    bench = measured(tmp_path / "results.json", image=0.2, text=0.2)
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="python", threads=2), bench)
    model = started(repository, f"embed_{tower}")
    assert model.session.get_session_options().intra_op_num_threads == 2
    good = [[png(0)], [png(2), png(3)]] if tower == "image" else [[b"a"], [b"cat", b"tuna"]]
    given = [good[0], [good[1][0], b"\xff"], good[1]]
    one, bad, two = model.execute([strings(**{tower: [[item] for item in items]}) for items in given])
    preprocess = read_export(export).preprocess
    for response, items in zip((one, two), good, strict=True):
        if tower == "image":
            rows = [normalised(fitted(open_image(item), preprocess), preprocess).sum() for item in items]
            expected = np.repeat(np.asarray(rows)[:, None], DIM, axis=1)
        else:
            expected = TABLE[ids([item.decode() for item in items])].mean(axis=1)
        np.testing.assert_allclose(response.outputs[f"{tower}_embeds"], expected, rtol=1e-5)
    assert bad.outputs == {} and bad.error.code == Fault.INVALID_ARG
    assert ("not a readable image" if tower == "image" else "UTF-8") in bad.error
    model.finalize()
    assert model.session is None


def ids(texts):
    return np.asarray([[len(text), 1, 0] for text in texts], np.int64)


def probabilities(images, labels, templates=("a photo of a {}",), scale=20.590953826904297):
    classes = [np.mean([by_hand(t.replace("{}", label).encode()) for t in templates], axis=0) for label in labels]
    classes = np.stack([vector / np.linalg.norm(vector) for vector in classes])
    weights = np.exp(scale * np.stack([by_hand(image) for image in images]) @ classes.T)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ("in ensemble 'embed_text', text: Exceeds maximum queue size", Fault.UNAVAILABLE),
        ("in ensemble 'embed_text', Request timeout expired", Fault.UNAVAILABLE),
        ("in ensemble 'embed_image', Stub process 'preprocess_0_0' is not healthy.", Fault.UNAVAILABLE),
        ("in ensemble 'embed_image', MemoryError: ", Fault.INTERNAL),
        ("in ensemble 'embed_image', the input is not a readable image: its end", Fault.INVALID_ARG),
    ],
)
def test_another_models_error_says_whose_fault_it_is(python_backend, told, code):
    from clipress.serve.triton_model import ModelError, failed

    assert failed(ModelError(told)).error == told and failed(ModelError(told)).error.code == code


def test_classify_asks_for_a_label_set_once_and_for_no_more_than_a_batch(export, tmp_path, python_backend):
    model = started(python_repository(export, tmp_path, max_batch=2), "classify")
    images, labels, templates = [b"1", b"2", b"3"], ["cat", "dog", "fox"], ["{}", "{}?"]
    asked = strings(image=images, labels=[b"cat", b"dog", b"fox"], templates=[b"{}", b"{}?"])
    for _ in range(2):
        (response,) = asyncio.run(model.execute([asked]))
        found = response.outputs["probabilities"]
        np.testing.assert_allclose(found, probabilities(images, labels, templates), rtol=1e-5)
    texts, pictures = ("embed_text", 2), [("embed_image", 2), ("embed_image", 1)]
    assert Asked.log == [texts] * 3 + pictures * 2
    (other,) = asyncio.run(model.execute([strings(image=images, labels=[b"cat", b"dog", b"fox"])]))
    np.testing.assert_allclose(other.outputs["probabilities"], probabilities(images, labels), rtol=1e-5)


def test_a_question_that_cannot_be_answered_fails_alone(export, tmp_path, python_backend):
    model = started(python_repository(export, tmp_path), "classify")
    many = [b"%d" % n for n in range(1001)]
    questions = [
        strings(image=[b"1"], labels=[b"cat"]),
        strings(image=[b"1", b"bad"], labels=[b"cat"]),
        strings(image=[b"1"], labels=[b"cat", b"cat"]),
        strings(image=[b"1"], labels=[]),
        strings(image=[b"1"], labels=many, templates=[b"{} " + n for n in many[:100]]),
        strings(image=[b"2"], labels=[b"cat", b"dog"]),
    ]
    good, picture, labels, none, prompts, other = asyncio.run(model.execute(questions))
    assert "in ensemble: bad" in picture.error
    assert picture.error.code == labels.error.code == none.error.code == Fault.INVALID_ARG
    assert "repeated ones: cat" in labels.error
    assert "labels: at least one" in none.error and "1001 labels in 100 templates" in prompts.error
    assert good.outputs["probabilities"].tolist() == [[1.0]]
    np.testing.assert_allclose(other.outputs["probabilities"], probabilities([b"2"], ["cat", "dog"]), rtol=1e-5)


def test_search_gives_the_nearest_keys_of_every_text(export, index, tmp_path, python_backend):
    model = started(python_repository(export, tmp_path, index=index), "search")
    texts = [b"a cat", "käfer".encode()]
    default, three, bad = asyncio.run(
        model.execute(
            [
                strings(text=texts),
                strings(text=texts) | {"k": Tensor("k", np.asarray([3], np.int32))},
                strings(text=texts) | {"k": Tensor("k", np.asarray([0], np.int32))},
            ]
        )
    )
    scores = np.stack([by_hand(text) for text in texts]) @ TABLE.T
    np.testing.assert_allclose(three.outputs["scores"], -np.sort(-scores)[:, :3], rtol=1e-6)
    nearest = [[f"käfer-{n}.png".encode() for n in row] for row in np.argsort(-scores)[:, :3]]
    assert three.outputs["keys"].tolist() == nearest
    assert default.outputs["keys"].shape == (2, WORDS)
    assert "k: 1 or more is asked for, found 0" in bad.error
