"""Triton model repositories: the files and configurations that a server reads."""

import hashlib
import json
import re
import sys
from types import ModuleType

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from small_exports import write_classifier, write_questions, write_segmenter
from triton_requests import write_latencies
from tritonclient.grpc.model_config_pb2 import TYPE_FP32, TYPE_STRING, ModelConfig

from clipress.data.transforms import open_image
from clipress.errors import ArtifactError, ExportError
from clipress.runtime.cpu import Processor
from clipress.serve import triton_config, triton_repo
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_config import server_options
from clipress.serve.triton_repo import (
    has_outdated_code,
    serve_version,
    served_version,
    triton_repo_from_export,
    update_code,
    versions_of,
)

SIZE, LENGTH, DIM, WORDS = 2, 3, 4, 10
TABLE = np.random.default_rng(0).standard_normal((WORDS, DIM)).astype(np.float32)


def save(path, nodes, takes, gives, weight):
    graph = helper.make_graph(nodes, "tower", [takes], [gives], [numpy_helper.from_array(weight, "weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def export(tmp_path):
    """Write an export folder whose image encoder is linear and whose text encoder averages rows of TABLE."""
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
        "preprocess/warmup/image",
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


def test_only_the_chosen_backend_is_written(export, tmp_path):
    settings = ServeSettings(backend=("python", "python"))
    assert triton_repo_from_export(export, tmp_path / "triton", settings) == [tmp_path / "triton" / "python"]
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["python"]


def test_the_image_encoder_is_described_as_triton_expects(export, tmp_path):
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
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] zero_data: true } } },
          { name: "batch_16" batch_size: 16
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] zero_data: true } } }
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
def test_the_parameters_hold_all_that_clients_need(export, tmp_path, model):
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
        "crop_pct": 1.0,
        "fill_color": 0,
    }
    assert json.loads(parameters["tokenizer"]) == {
        "name": "clip-bpe",
        "context_length": 3,
        "kwargs": {"clean": 'lower "ä"'},
    }


@pytest.mark.parametrize(
    ("portable", "isa", "exact", "level"),
    [(True, (), False, 0), (False, ("avx512_vnni",), True, 0), (False, (), True, -1)],
)
def test_weights_in_8_bits_are_served_exactly_where_they_would_overflow(
    export, tmp_path, monkeypatch, portable, isa, exact, level
):
    changed(export, precision="int8", portable=portable)
    monkeypatch.setattr(triton_config, "processor", lambda: Processor("A CPU", "x86_64", 2, isa))
    triton_repo_from_export(export, tmp_path / "triton", ServeSettings(backend=("onnxruntime", "python")))
    config = config_in(tmp_path / "triton" / "onnxruntime", "image_encoder")
    assert (config.parameters["session.x64quantprecision"].string_value == "1") is exact
    assert config.optimization.graph.level == level
    page = (tmp_path / "triton" / "onnxruntime" / "README.md").read_text(encoding="utf-8")
    assert ("serve such CPUs by the python backend" in page) is exact
    python = config_in(tmp_path / "triton" / "python", "image_encoder")  # Its sessions adapt to the CPU.
    assert "session.x64quantprecision" not in python.parameters and not python.optimization.HasField("graph")


@pytest.mark.parametrize(("small", "cached"), [(False, {"text_encoder"}), (True, {"text_encoder", "embed_text"})])
def test_only_text_encoders_are_cached_and_only_if_the_settings_say_so(export, tmp_path, small, cached):
    bench = write_latencies(tmp_path / "results.json", text=0.2 if small else 2)
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
    "printed, message", [('name: "other"', "another configuration"), ("nme: 1", "cannot be read back")]
)
def test_a_configuration_that_does_not_read_back_is_not_written(export, tmp_path, monkeypatch, printed, message):
    monkeypatch.setattr(text_format, "MessageToString", lambda config: printed)
    with pytest.raises(ExportError, match=f"image_encoder.*{message}"):
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
        assert "faiss" not in page
        body = json.loads(re.findall(r"-d '(.*)'", page)[2])
        assert np.asarray(body["inputs"][0]["data"]).reshape(body["inputs"][0]["shape"]).shape == (1, LENGTH)
        compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "README.md", "exec")
    assert [re.search(r"docker run .*\n  (.*)", page)[1] for page in pages] == [
        f"clipress-triton:24.10 tritonserver --model-repository=/models/{backend}"
        for backend in ("onnxruntime", "python")
    ]


def test_a_server_of_several_instances_gets_their_priorities(export, tmp_path):
    repository = python_repository(export, tmp_path, instances=2)
    assert server_options(repository) == ["--rate-limit=execution_count"]
    page = (repository / "README.md").read_text(encoding="utf-8")
    assert "--model-repository=/models/python --rate-limit=execution_count\n" in page


def changed(export, **described):
    """Change an export in place: the text encoder, or entries of export.json."""
    path = export / "export.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if not described:
        model = onnx.load(export / "text.onnx")
        model.producer_version += "x"
        onnx.save(model, export / "text.onnx")
        written["files"]["text"]["sha256"] = hashlib.sha256((export / "text.onnx").read_bytes()).hexdigest()
    path.write_text(json.dumps({**written, **described}), encoding="utf-8")


def snapshot(repository):
    return {name: (repository / name).read_bytes() for name in files_in(repository)}


def python_repository(export, target, **settings):
    return triton_repo_from_export(export, target, ServeSettings(backend="python", **settings))[0]


def policies(repository):
    """Return the versions that the models' policies name; None means the newest."""
    configs = [config_in(repository, model) for model in MODELS]
    return {max(config.version_policy.specific.versions, default=None) for config in configs}


def test_an_export_that_has_not_changed_adds_nothing_and_touches_nothing(export, tmp_path):
    repository = python_repository(export, tmp_path)
    before, folder = snapshot(repository), repository.stat().st_ino
    assert snapshot(python_repository(export, tmp_path)) == before
    assert repository.stat().st_ino == folder  # A server or container that uses this folder is not disturbed.


def test_files_left_by_a_server_do_not_count_as_a_change(export, tmp_path):
    left = python_repository(export, tmp_path) / "preprocess" / "1" / "__pycache__" / "model.cpython-311.pyc"
    left.parent.mkdir()
    left.write_bytes(b"compiled")
    assert not (python_repository(export, tmp_path) / "preprocess" / "2").exists()


def test_the_same_export_from_another_machine_does_not_count_as_a_change(export, tmp_path):
    python_repository(export, tmp_path)
    changed(export, parity={"image_min_cosine": 0.5})
    elsewhere = tmp_path / "elsewhere"
    export.rename(elsewhere)
    assert not (python_repository(elsewhere, tmp_path) / "classify" / "2").exists()


def test_changed_settings_make_no_new_version(export, tmp_path):
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


def test_every_model_is_rolled_back_with_its_configuration(export, tmp_path):
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


def obsolete(repository):
    """Make all of a repository's code that of a clipress that is no longer installed; return what it was."""
    codes = {path: path.read_bytes() for path in repository.glob("*/*/model.py")}
    for path in codes:
        path.unlink()  # Versions share files.
        path.write_text("from clipress.serve.triton_model import removed\n")
    assert codes
    return codes


def code_in(repository):
    return {path: path.read_bytes() for path in repository.glob("*/*/model.py")}


def test_an_older_version_runs_with_the_installed_clipress_after_a_roll_back(export, tmp_path):
    repository = python_repository(export, tmp_path)
    first = obsolete(repository)
    changed(export)
    python_repository(export, tmp_path)
    second = {path.parents[1] / "2" / "model.py": code for path, code in first.items()}
    assert code_in(repository) == first | second
    obsolete(repository)
    assert serve_version(repository, None, ServeSettings()) == 1
    assert code_in(repository) == first | second
    for path in first:
        compile(path.read_bytes(), path, "exec")


def test_changed_code_makes_no_new_version(export, tmp_path):
    repository = python_repository(export, tmp_path)
    codes = obsolete(repository)
    python_repository(export, tmp_path)
    assert code_in(repository) == codes


def test_code_is_updated_and_configurations_stay(export, tmp_path):
    repository = python_repository(export, tmp_path, max_batch=3)
    before = snapshot(repository)
    assert not has_outdated_code(repository)
    linked = tmp_path / "linked.py"
    obsolete(repository)
    linked.hardlink_to(repository / "preprocess" / "1" / "model.py")
    assert has_outdated_code(repository)
    update_code(repository)
    assert snapshot(repository) == before
    assert "removed" in linked.read_text()  # The file was replaced: until it was, the older repository was whole.


def test_a_repository_stays_rolled_back_until_there_is_something_new(export, tmp_path):
    python_repository(export, tmp_path)
    changed(export)
    serve_version(python_repository(export, tmp_path), 1, ServeSettings())
    assert policies(python_repository(export, tmp_path, max_batch=5)) == {1}
    changed(export)
    repository = python_repository(export, tmp_path)
    assert policies(repository) == {None} and served_version(repository) == 3


def repository_of(export, target, versions, **settings):
    """Write a repository of that many versions."""
    for number in range(versions):
        changed(export, lineage_hash=f"of version {number}")
        repository = python_repository(export, target, **settings)
    return repository


def versions_by_model(repository):
    return {model: tuple(versions_of(repository, model)) for model in MODELS}


def test_older_versions_stay_unless_the_settings_limit_them(export, tmp_path):
    repository = repository_of(export, tmp_path, 4)
    assert versions_of(repository) == [1, 2, 3, 4]
    before = snapshot(repository)
    python_repository(export, tmp_path, keep=3)  # Nothing new is written, but the limit holds.
    assert set(versions_by_model(repository).values()) == {(2, 3, 4)}
    assert snapshot(repository) == {name: content for name, content in before.items() if "/1/" not in name}


def test_a_new_version_pushes_the_oldest_one_out(export, tmp_path):
    repository = repository_of(export, tmp_path, 4, keep=3)
    assert set(versions_by_model(repository).values()) == {(2, 3, 4)} and served_version(repository) == 4
    assert serve_version(repository, None, ServeSettings(keep=3)) == 3
    with pytest.raises(ArtifactError, match="versions found: 2, 3, 4"):
        serve_version(repository, 1, ServeSettings())


def test_the_version_that_is_served_is_never_removed(export, tmp_path):
    repository = repository_of(export, tmp_path, 4)
    serve_version(repository, 1, ServeSettings())
    python_repository(export, tmp_path, keep=1)
    assert (versions_of(repository), served_version(repository)) == ([1, 4], 1)
    changed(export, lineage_hash="newer")
    python_repository(
        export, tmp_path, keep=1
    )  # A server may still have version 1 loaded when it is told of version 5.
    assert (versions_of(repository), served_version(repository)) == ([1, 5], 5)
    python_repository(export, tmp_path, keep=1)
    assert versions_of(repository) == [5]


def test_a_version_that_is_chosen_stays_while_others_go(export, tmp_path):
    repository = repository_of(export, tmp_path, 5)
    assert serve_version(repository, 2, ServeSettings(keep=2)) == 2
    assert (versions_of(repository), served_version(repository)) == ([2, 4, 5], 2)


def test_the_index_of_a_removed_version_goes_with_it(export, index, tmp_path):
    repository = python_repository(export, tmp_path, index=index)
    (index / "parts" / "0").write_bytes(b"others")
    (index / ".lock").touch()
    python_repository(export, tmp_path, index=index, keep=1)
    python_repository(export, tmp_path, index=index, keep=1)
    assert files_in(repository / "search" / "2" / "index") == {"parts/0"}
    assert versions_of(repository, "search") == [2]


@pytest.mark.parametrize("version, message", [(None, "an older version"), (3, "version 3")])
def test_a_missing_version_is_an_error_that_lists_the_others(export, tmp_path, version, message):
    repository = python_repository(export, tmp_path)
    with pytest.raises(ArtifactError, match=rf"expected {message}; versions found: 1\. Run: clipress serve RUN"):
        serve_version(repository, version, ServeSettings())
    with pytest.raises(ArtifactError, match="versions found: none"):
        serve_version(tmp_path / "nowhere", version, ServeSettings())


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"export": {}}'])
def test_a_version_whose_record_is_damaged_is_not_served(export, tmp_path, content):
    repository = python_repository(export, tmp_path)
    changed(export)
    repository = python_repository(export, tmp_path)
    for record in repository.glob("*/1/release.json"):
        record.unlink()
        if content is not None:
            record.write_bytes(content)
    before = snapshot(repository)
    with pytest.raises(ArtifactError, match=r"1/release\.json.*clipress serve RUN"):
        serve_version(repository, 1, ServeSettings())
    assert snapshot(repository) == before


def test_an_export_of_another_size_is_not_a_new_version(export, tmp_path):
    before = snapshot(python_repository(export, tmp_path))
    changed(export, preprocess={"size": 4})
    message = r"image_encoder .* takes pixel_values \[3, 2, 2\].*takes pixel_values \[3, 4, 4\].*new repository"
    with pytest.raises(ExportError, match=message):
        python_repository(export, tmp_path)
    assert snapshot(tmp_path / "python") == before


def test_images_and_texts_are_chained_to_the_models_that_prepare_them(export, tmp_path):
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
    bench = write_latencies(tmp_path / "results.json", image=0.9, text=1.1)
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
        model_warmup [ { name: "image" batch_size: 1
            inputs { key: "image" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "image" } } } ]
    """
    assert config == text_format.Parse(expected, ModelConfig())
    assert open_image((python / "embed_image" / "warmup" / "image").read_bytes()[4:]).size == (SIZE, SIZE)
    assert config_in(python, "embed_text").platform == "ensemble"
    assert {config_in(runtime, f"embed_{tower}").platform for tower in ("image", "text")} == {"ensemble"}
    copies = [python / model / "1" / "model.onnx" for model in ("image_encoder", "embed_image")]
    assert copies[0].samefile(copies[1])


def test_new_measurements_change_sizes_but_make_no_new_version(export, tmp_path):
    settings = ServeSettings(backend="python", instances=1)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    triton_repo_from_export(export, tmp_path, settings, write_latencies(tmp_path / "results.json", image=0.2))
    assert config_in(repository, "embed_image").backend == "python"
    assert policies(repository) == {None} and not (repository / "embed_image" / "2").exists()


def test_a_version_without_the_encoders_file_in_embed_stays_a_chain(export, tmp_path):
    """Earlier versions of clipress did not fuse very small encoders."""
    bench = write_latencies(tmp_path / "results.json", image=0.2, text=0.2)
    settings = ServeSettings(backend="python", instances=1)
    (repository,) = triton_repo_from_export(export, tmp_path, settings, bench)
    for path in repository.glob("*/1/release.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "fusible": False}), encoding="utf-8")
    changed(export)
    triton_repo_from_export(export, tmp_path, settings, bench)
    assert config_in(repository, "embed_text").backend == "python"
    assert serve_version(repository, None, settings, bench) == 1
    assert config_in(repository, "embed_text").platform == "ensemble"


def test_the_warm_up_is_an_image_and_a_text_as_triton_stores_strings(export, tmp_path):
    repository = python_repository(export, tmp_path)
    for model, name in (("preprocess", "image"), ("tokenize", "text")):
        (sample,) = config_in(repository, model).model_warmup
        (given,) = sample.inputs.values()
        assert given.input_data_file == name
        stored = (repository / model / "warmup" / name).read_bytes()
        assert int.from_bytes(stored[:4], "little") == len(stored) - 4
    assert open_image((repository / "preprocess" / "warmup" / "image").read_bytes()[4:]).size == (SIZE, SIZE)
    assert (repository / "tokenize" / "warmup" / "text").read_bytes()[4:].decode() == "a photo of a cat"


def test_the_rate_limiter_gets_the_resources_of_the_encoders(export, tmp_path):
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
    """Put an engine and its sidecar into an export."""
    plan = export / "tensorrt" / f"{tower}.{gpu}.trt{trt}.{precision}.engine"
    plan.parent.mkdir(exist_ok=True)
    plan.write_bytes(f"plan of {plan.name}".encode())
    shape = (3, SIZE, SIZE) if tower == "image" else (LENGTH,)
    sidecar = {
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
    plan.with_name(f"{plan.name}.json").write_text(json.dumps(sidecar | changes), encoding="utf-8")
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


def test_the_readme_names_a_number_of_rows_that_every_graph_takes(export, tmp_path):
    engine(export, "text")
    engine(export, "image", profile={"min": [1], "opt": [4], "max": [16]})
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="tensorrt"))
    assert "Requests of up to 16 rows" in " ".join((repository / "README.md").read_text(encoding="utf-8").split())


def test_an_engine_version_is_rolled_back_unchanged(export, tmp_path):
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
    "made, message",
    [
        ([], "engines found: none. Build it .*clipress export RUN --tensorrt"),
        ([{"onnx_sha256": "0" * 64}], r"current image\.onnx; engines found: image\.nvidia"),
        ([{}, {"precision": "bf16"}], "Set serve.precision"),
        ([{}, {"gpu": "nvidia-h100"}], "expected one engine per kind of GPU"),
        ([{"profile": {"min": [2], "opt": [2], "max": [2]}}], "batches of 2 or more"),
    ],
    ids=["none", "of another export", "two precisions", "two of a kind", "no single rows"],
)
def test_an_ambiguous_or_missing_engine_is_an_error(export, tmp_path, made, message):
    engine(export, "text")
    for changes in made:
        engine(export, "image", **changes)
    with pytest.raises(ExportError, match=message):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings(backend="tensorrt"))
    assert not (tmp_path / "triton").exists()


def test_an_engine_that_differs_from_its_sidecar_is_not_served(export, tmp_path):
    engine(export, "text")
    engine(export, "image").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"truncated or changed.*not loaded"):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings(backend="tensorrt"))


# --- an index to search ---


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Make a stand-in for an index: a folder, and a module that opens it."""
    folder = tmp_path / "index"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "0").write_bytes(b"vectors")

    class Index:
        dim, lineage = DIM, "0123456789abcdef"

    module = ModuleType("clipress.serve.index")
    module.Index, module.open_index = Index, lambda folder: Index()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return folder


def test_an_index_belongs_to_the_version_that_searches_it(export, index, tmp_path):
    repository = python_repository(export, tmp_path, index=index)
    assert (repository / "search" / "1" / "index" / "parts" / "0").read_bytes() == b"vectors"
    (index / "parts" / "0").write_bytes(b"others")
    repository = python_repository(export, tmp_path, index=index)
    assert [(repository / "search" / n / "index" / "parts" / "0").read_bytes() for n in "12"] == [b"vectors", b"others"]
    page = (repository / "README.md").read_text(encoding="utf-8")
    assert "`search`" in page and re.search(r"RUN pip install .* faiss-cpu\n", page)


def test_rolling_back_to_a_version_without_an_index_drops_search(export, index, tmp_path):
    python_repository(export, tmp_path)
    repository = python_repository(export, tmp_path, index=index)
    assert (repository / "search" / "2").is_dir() and not (repository / "search" / "1").exists()
    serve_version(repository, 1, ServeSettings())
    assert not (repository / "search").exists()


@pytest.mark.parametrize("change", [{"lineage": "of another"}, {"dim": 5}])
def test_an_index_of_another_model_is_refused(export, index, tmp_path, monkeypatch, change):
    for name, value in change.items():
        monkeypatch.setattr(sys.modules["clipress.serve.index"].Index, name, value)
    with pytest.raises(
        ArtifactError, match=r"Index .*: expected lineage 0123456789abcdef and 4 dimensions, as int8 has; found"
    ):
        python_repository(export, tmp_path / "triton", index=index)
    assert not (tmp_path / "triton").exists()


def test_a_version_whose_index_is_gone_is_not_served(export, index, tmp_path):
    python_repository(export, tmp_path)
    repository = python_repository(export, tmp_path, index=index)
    serve_version(repository, 1, ServeSettings())
    with pytest.raises(ArtifactError, match=r"search/2.*clipress serve RUN"):
        serve_version(repository, 2, ServeSettings())
    assert (python_repository(export, tmp_path, index=index) / "search" / "3" / "index").is_dir()


# --- other tasks than CLIP ---


def models_of(repository):
    return {path.parent.name for path in repository.glob("*/config.pbtxt")}


@pytest.mark.parametrize("small", [False, True])
def test_a_classifier_has_no_models_for_texts(tmp_path, small):
    bench = write_latencies(tmp_path / "results.json", image=0.2 if small else 2)
    export = write_classifier(tmp_path / "export")
    settings = ServeSettings(backend="python", max_batch=8, instances=1, threads=1)
    (repository,) = triton_repo_from_export(export, tmp_path / "triton", settings, bench)
    assert models_of(repository) == {"image_classifier", "preprocess", "score_image", "classify"}
    config, parameters = without_parameters(config_in(repository, "image_classifier"))
    expected = """
        name: "image_classifier"  backend: "python"  max_batch_size: 8
        input [ { name: "pixel_values" data_type: TYPE_FP32 dims: [ 3, 2, 2 ] } ]
        output [ { name: "logits" data_type: TYPE_FP32 dims: [ 4 ] } ]
        version_policy { latest { num_versions: 1 } }
        instance_group [ { kind: KIND_CPU count: 1 } ]
        dynamic_batching { }
        model_warmup [
          { name: "batch_1" batch_size: 1
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] zero_data: true } } },
          { name: "batch_8" batch_size: 8
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] zero_data: true } } }
        ]
    """
    assert config == text_format.Parse(expected, ModelConfig())
    assert parameters.keys() == {"intra_op_thread_count", "lineage_hash", "precision", "preprocess"}
    classify, parameters = without_parameters(config_in(repository, "classify"))
    assert [one.name for one in classify.input] == ["image"]
    assert [(one.name, list(one.dims)) for one in classify.output] == [("probabilities", [-1, 4]), ("labels", [4])]
    assert json.loads(parameters["labels"]) == ["cat", "dog", "red fox", "Käfer"]
    assert config_in(repository, "score_image").backend == ("python" if small else "")
    assert serve_version(repository, 1, settings, bench) == 1


def test_a_segmenter_is_served_for_images_of_any_size(tmp_path):
    settings = ServeSettings(backend="python", max_batch=8)
    (repository,) = triton_repo_from_export(write_segmenter(tmp_path / "export"), tmp_path / "triton", settings)
    assert models_of(repository) == {"image_segmenter", "preprocess", "score_patches_of_image", "segment"}
    config = config_in(repository, "segment")
    assert [(one.name, list(one.dims)) for one in config.output] == [("mask", [-1, -1]), ("labels", [4])]
    page = (repository / "README.md").read_text(encoding="utf-8")
    assert "`mask` UINT16 [H, W], places in `labels` BYTES [4]" in page and "`segment` take a batch" in page
    compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "README.md", "exec")


def test_the_readme_of_a_classifier_covers_only_its_models(tmp_path):
    (repository,) = triton_repo_from_export(
        write_classifier(tmp_path / "export"), tmp_path / "triton", ServeSettings(backend="python")
    )
    page = (repository / "README.md").read_text(encoding="utf-8")
    assert "The classifier has 4 labels." in page and "`probabilities` FP32 [N, 4], `labels` BYTES [4]" in page
    compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "README.md", "exec")
    requested = set(re.findall(r"v2/models/(\w+)", page))
    assert requested and requested <= models_of(repository)
    for word in ("tokenize", "text", "embed", "search", "ftfy"):
        assert word not in page


def test_a_graph_of_several_inputs_is_chained_to_all_that_prepare_them(tmp_path):
    # The model has too many inputs to prepare them in one process.
    bench = write_latencies(tmp_path / "results.json", question=0.2)
    settings = ServeSettings(backend="python", max_batch=8, instances=1, text_cache_mb=1)
    (repository,) = triton_repo_from_export(write_questions(tmp_path / "export"), tmp_path / "triton", settings, bench)
    assert models_of(repository) == {"question_encoder", "preprocess", "tokenize", "embed_question"}
    encoder, chain = config_in(repository, "question_encoder"), config_in(repository, "embed_question")
    assert [one.name for one in encoder.input] == ["pixel_values", "input_ids", "weight"]
    assert list(chain.output) == list(encoder.output) and len(encoder.output) == 2
    assert {name for warm_up in encoder.model_warmup for name in warm_up.inputs} == {
        "pixel_values",
        "input_ids",
        "weight",
    }
    assert not encoder.response_cache.enable
    assert [(one.name, one.data_type, list(one.dims)) for one in chain.input] == [
        ("image", TYPE_STRING, [1]),
        ("text", TYPE_STRING, [1]),
        ("weight", TYPE_FP32, [1]),
    ]
    steps = [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in chain.ensemble_scheduling.step]
    assert steps == [
        ("preprocess", {"image": "image"}, {"pixel_values": "pixel_values"}),
        ("tokenize", {"text": "text"}, {"input_ids": "input_ids"}),
        (
            "question_encoder",
            {name: name for name in ("pixel_values", "input_ids", "weight")},
            {name: name for name in ("question_embeds", "difference")},
        ),
    ]
    page = (repository / "README.md").read_text(encoding="utf-8")
    assert "| `embed_question` | `image`, `text`, `weight` | `question_embeds`, `difference` |" in page


def test_an_index_needs_a_text_encoder(tmp_path, index):
    with pytest.raises(ExportError, match="expected a graph 'text' that gives embeddings"):
        python_repository(write_classifier(tmp_path / "export"), tmp_path / "triton", index=index)


def test_a_release_of_version_1_is_still_served(export, tmp_path):
    """It called engines plans, and did not describe the export's graphs."""
    settings = ServeSettings(backend="tensorrt")
    for graph in ("image", "text"):
        engine(export, graph)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    before = snapshot(repository)
    for path in repository.glob("*/1/release.json"):
        written = json.loads(path.read_text(encoding="utf-8"))
        written["plans"] = written.pop("engines")
        del written["export"]["graphs"], written["export"]["task"]
        path.write_text(json.dumps(written), encoding="utf-8")
    assert serve_version(repository, 1, settings) == 1
    assert {name: text for name, text in snapshot(repository).items() if "release.json" not in name} == {
        name: text for name, text in before.items() if "release.json" not in name
    }


# --- errors that a real server cannot be made to return ---


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("in ensemble 'embed_text', text: Exceeds maximum queue size", "UNAVAILABLE"),
        ("in ensemble 'embed_text', Request timeout expired", "UNAVAILABLE"),
        ("in ensemble 'embed_image', Stub process 'preprocess_0_0' is not healthy.", "UNAVAILABLE"),
        ("in ensemble 'embed_image', MemoryError: ", "INTERNAL"),
        ("in ensemble 'embed_image', the input is not a readable image: its end", "INVALID_ARG"),
    ],
)
def test_another_models_error_keeps_its_status(monkeypatch, message, code):
    utils = ModuleType("triton_python_backend_utils")
    utils.TritonError = lambda text, status: (text, status)
    utils.TritonError.UNAVAILABLE, utils.TritonError.INTERNAL = "UNAVAILABLE", "INTERNAL"
    utils.TritonError.INVALID_ARG, utils.InferenceResponse = "INVALID_ARG", lambda error: error
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.delitem(sys.modules, "clipress.serve.triton_model", raising=False)
    from clipress.serve.triton_model import ModelError, error_response

    assert error_response(ModelError(message)) == (message, code)
