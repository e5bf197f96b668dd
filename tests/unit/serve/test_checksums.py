"""`serve.checksums`: what the configurations tell Triton's repository agent `checksum`, and what a real server makes of it."""

import hashlib
import shutil
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto
from small_exports import LENGTH, TEXT_WEIGHT, TOKENIZER, describe, linear_encoder, write_classifier, write_export
from triton_requests import IMAGES, SETTINGS
from tritonclient.grpc.model_config_pb2 import ModelConfig

from clipress.errors import ArtifactError, ServerError
from clipress.serve.classify import LoadedModel
from clipress.serve.client import Client
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_repo import has_outdated_code, serve_version, triton_repo_from_export, update_code
from clipress.serve.triton_server import TritonServer

CHECKED = SETTINGS.model_copy(update={"checksums": True})


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "export")


def changed(export):
    """Change the text encoder of an export in place."""
    weight = TEXT_WEIGHT * np.random.default_rng(zlib.crc32((export / "text.onnx").read_bytes())).random()
    linear_encoder(export / "text.onnx", "input_ids", TensorProto.INT64, [LENGTH], "text_embeds", weight)
    describe(export, tokenizer=TOKENIZER)


def repository_of(export, target, versions=1, **settings):
    """Write a repository of that many versions."""
    for number in range(versions):
        if number:
            changed(export)
        (repository,) = triton_repo_from_export(export, target, CHECKED.model_copy(update=settings))
    return repository


def config_of(model):
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def listed(model):
    """Return what the configuration of a model tells the agent."""
    (agent,) = config_of(model).model_repository_agents.agents
    assert agent.name == "checksum"
    return dict(agent.parameters)


def md5_of(folder, *patterns):
    """Return the MD5 of files by their path below a folder, but for what is always written anew."""
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file() and path.name not in ("config.pbtxt", "README.md", "MD5SUMS")
    }


def assert_checked(repository, version):
    """Every model's configuration lists the files of that version and its warm-up, and MD5SUMS has all files."""
    models = [path.parent for path in repository.glob("*/config.pbtxt")]
    assert models
    for model in models:
        expected = md5_of(model, f"{version}/**/*", "warmup/*")
        assert f"{version}/release.json" in expected
        assert listed(model) == {f"MD5:{name}": digest for name, digest in expected.items()}
    lines = [f"{digest}  {name}" for name, digest in md5_of(repository, "*/**/*").items()]
    assert sorted((repository / "MD5SUMS").read_text(encoding="utf-8").splitlines()) == sorted(lines)


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_a_configuration_lists_every_file_of_its_model_with_its_md5(export, tmp_path, backend):
    repository = repository_of(export, tmp_path / "triton", backend=(backend,))
    for model in (path.parent for path in repository.glob("*/config.pbtxt")):
        assert listed(model) == {f"MD5:{name}": digest for name, digest in md5_of(model, "**/*").items()}
    assert "MD5:1/model.onnx" in listed(repository / "text_encoder")
    assert "MD5:warmup/image" in listed(repository / "preprocess")
    assert_checked(repository, 1)


def test_they_match_the_files_of_the_served_version_whatever_is_added_removed_or_rolled_back(export, tmp_path):
    repository = repository_of(export, tmp_path / "triton", 4)
    assert_checked(repository, 4)
    assert serve_version(repository, 2, CHECKED) == 2
    assert_checked(repository, 2)
    repository_of(export, tmp_path / "triton", keep=1)
    assert sorted(path.name for path in repository.glob("text_encoder/[0-9]*")) == ["2", "4"]
    assert_checked(repository, 2)
    assert serve_version(repository, 4, CHECKED) == 4
    assert_checked(repository, 4)
    update_code(repository)
    assert_checked(repository, 4)


def test_md5sum_reads_the_list_and_finds_what_has_changed(export, tmp_path):
    if shutil.which("md5sum") is None:
        pytest.skip("no md5sum")
    repository = repository_of(export, tmp_path / "triton", 2)

    def check():
        command = ["md5sum", "--check", "--quiet", "MD5SUMS"]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)

    assert check().returncode == 0
    truncate(repository / "text_encoder" / "1" / "model.onnx")
    assert check().returncode and check().stdout == "text_encoder/1/model.onnx: FAILED\n"


def truncate(path):
    """Shorten a file, as a copy that was interrupted."""
    content = path.read_bytes()
    path.unlink()  # Versions share files.
    path.write_bytes(content[: len(content) // 2])


def test_a_damaged_file_keeps_the_checksum_of_what_was_written(export, tmp_path):
    repository = repository_of(export, tmp_path / "triton", 2)
    file = repository / "text_encoder" / "1" / "model.onnx"
    written = hashlib.md5(file.read_bytes()).hexdigest()
    truncate(file)
    for _ in range(2):
        assert serve_version(repository, 1, CHECKED) == 1
        assert listed(repository / "text_encoder")["MD5:1/model.onnx"] == written
        repository_of(export, tmp_path / "triton", max_batch=3)  # It stays rolled back; the configurations change.
        assert listed(repository / "text_encoder")["MD5:1/model.onnx"] == written
        serve_version(repository, 2, CHECKED)
    names = listed(repository / "text_encoder")
    assert not any(name.startswith("MD5:1/") for name in names)  # It is not served: it keeps nothing from loading.


def test_code_of_another_clipress_is_updated_with_its_checksum(export, tmp_path):
    repository = repository_of(export, tmp_path / "triton", 2)
    codes = list(repository.glob("*/*/model.py"))
    listing = [repository / "MD5SUMS", *repository.glob("*/config.pbtxt")]
    older = b"from clipress.serve.triton_model import removed\n"
    for digest in {hashlib.md5(path.read_bytes()).hexdigest() for path in codes}:
        for path in listing:
            path.write_text(path.read_text(encoding="utf-8").replace(digest, hashlib.md5(older).hexdigest()))
    for path in codes:
        path.unlink()  # Versions share files.
        path.write_bytes(older)
    assert_checked(repository, 2)
    assert has_outdated_code(repository)
    update_code(repository)
    assert not has_outdated_code(repository)
    assert_checked(repository, 2)


def test_the_setting_may_be_changed_later(export, tmp_path):
    plain = {"checksums": False}
    assert not ServeSettings().checksums
    repository = repository_of(export, tmp_path / "triton", 2, **plain)
    assert not (repository / "MD5SUMS").exists() and "MD5SUMS" not in (repository / "README.md").read_text()
    assert not config_of(repository / "classify").HasField("model_repository_agents")
    repository_of(export, tmp_path / "triton")
    assert_checked(repository, 2)
    assert "md5sum --check --quiet MD5SUMS" in (repository / "README.md").read_text()
    repository_of(export, tmp_path / "triton", **plain)
    assert not (repository / "MD5SUMS").exists()
    assert not config_of(repository / "classify").HasField("model_repository_agents")


def test_a_damaged_list_is_one_message(export, tmp_path):
    repository = repository_of(export, tmp_path / "triton")
    (repository / "MD5SUMS").write_text("nothing")
    changed(export)
    with pytest.raises(ArtifactError, match=r"MD5SUMS is damaged: .*clipress serve RUN"):
        repository_of(export, tmp_path / "triton")


AGENT = r"""
// A repository agent in Triton's C API: it writes down what it is given, and lets md5sum compare.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { LOAD = 0, INVALID = 3 };
void *TRITONSERVER_ErrorNew(int code, const char *message);
void *TRITONREPOAGENT_ModelRepositoryLocation(void *agent, void *model, int *kind, const char **location);
void *TRITONREPOAGENT_ModelParameterCount(void *agent, void *model, uint32_t *count);
void *TRITONREPOAGENT_ModelParameter(void *agent, void *model, uint32_t index, const char **key, const char **value);

void *TRITONREPOAGENT_ModelAction(void *agent, void *model, int action) {
  if (action != LOAD) return NULL;
  int kind;
  uint32_t count;
  const char *location, *key, *value;
  TRITONREPOAGENT_ModelRepositoryLocation(agent, model, &kind, &location);
  TRITONREPOAGENT_ModelParameterCount(agent, model, &count);
  FILE *given = fopen(getenv("AGENT_GIVEN"), "a"), *sums = popen("md5sum --check --status", "w");
  for (uint32_t index = 0; index < count; index++) {
    TRITONREPOAGENT_ModelParameter(agent, model, index, &key, &value);
    fprintf(given, "%s %s %s\n", location, key, value);
    fprintf(sums, "%s  %s/%s\n", value, location, key + 4);  // behind MD5:
  }
  fclose(given);
  return pclose(sums) ? TRITONSERVER_ErrorNew(INVALID, "a file is not as it was written") : NULL;
}
"""


@pytest.fixture(scope="module")
def agent(triton, tmp_path_factory):
    """Return a real Triton with a small agent of ours under the name of NVIDIA's, and the file of what it was given."""
    compiler = shutil.which("cc")
    if compiler is None or shutil.which("md5sum") is None:
        pytest.skip("no C compiler, or no md5sum")
    folder = tmp_path_factory.mktemp("agents")
    (folder / "checksum").mkdir()
    (folder / "agent.c").write_text(AGENT, encoding="utf-8")
    library = folder / "checksum" / "libtritonrepoagent_checksum.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "agent.c"], check=True)
    given = folder / "given"
    environment = {**triton.environment, "AGENT_GIVEN": str(given)}
    options = (*triton.options, f"--repoagent-directory={folder}")
    return replace(triton, options=options, environment=environment), given


@pytest.fixture
def classifier(tmp_path):
    export = write_classifier(tmp_path / "export")
    (repository,) = triton_repo_from_export(export, tmp_path / "triton", CHECKED)
    return repository


def test_a_server_hands_the_agent_every_checksum_and_serves(agent, classifier):
    server, given = agent
    with TritonServer(classifier, triton=server) as running, Client(f"grpc://{running.grpc}") as client:
        local = LoadedModel(classifier.parents[1] / "export", threads=1)
        np.testing.assert_allclose(client.classify(IMAGES).values, local.classify(IMAGES), atol=1e-6)
    expected = {
        f"{model.parent} {key} {value}"
        for model in classifier.glob("*/config.pbtxt")
        for key, value in listed(model.parent).items()
    }
    assert len(expected) > 8 and set(given.read_text(encoding="utf-8").splitlines()) >= expected


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()], ids=["truncated", "missing"])
def test_a_server_refuses_a_model_whose_file_is_not_as_it_was_written(agent, classifier, damage):
    damage(classifier / "image_classifier" / "1" / "release.json")  # Nothing else would notice this one.
    with pytest.raises(ServerError) as refused, TritonServer(classifier, triton=agent[0]):
        pass
    assert "'image_classifier': a file is not as it was written" in str(refused.value)


def test_a_loaded_model_answers_on_when_its_reload_is_refused_with_the_reason(agent, classifier):
    with TritonServer(classifier, triton=agent[0]) as server, Client(f"grpc://{server.grpc}") as client:
        before = client.classify(IMAGES).values
        truncate(classifier / "image_classifier" / "1" / "model.onnx")
        with pytest.raises(ServerError, match=r"could not load image_classifier: .* a file is not as it was written\."):
            server.load("image_classifier")
        np.testing.assert_array_equal(client.classify(IMAGES).values, before)
        server.load("preprocess")  # The others are not affected.


def test_a_server_without_the_agent_is_one_message_that_says_what_to_do(triton, classifier):
    with pytest.raises(ServerError) as refused, TritonServer(classifier, triton=triton):
        pass
    assert "libtritonrepoagent_checksum.so" in str(refused.value) and "\n" not in str(refused.value)
    assert "README.md" in str(refused.value) and "serve.checksums to false" in str(refused.value)
    assert "Its log" not in str(refused.value)
