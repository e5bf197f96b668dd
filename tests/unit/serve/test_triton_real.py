"""The repository on a real Triton: what the server answers is what this machine computes from the same files.

Skipped where no server is installed. One server answers all of them: its repository has two versions, the second served.
"""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from asking import (
    MODELS,
    PICTURES,
    SETTINGS,
    asked,
    classified,
    embedded_or_error,
    embeds_of,
    executions,
    measured,
    picture,
    pixels_of,
    processes,
)
from tritonclient.utils import InferenceServerException

from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import MAX_PIXELS
from clipress.runtime.export_folder import read_export
from clipress.serve.classify import LoadedModel
from clipress.serve.client import Client
from clipress.serve.index import open_index
from clipress.serve.indexing import index_pictures
from clipress.serve.triton_repo import serve_version, triton_repo_from_export
from clipress.serve.triton_server import TritonServer

TEXTS = ["a photo of a cat", "a photo of the digit five", "Käfer, лиса", "word " * 200, ""]


@pytest.fixture
def client(served):
    with triton_grpc.InferenceServerClient(served.grpc) as client:
        yield client


def test_every_model_is_ready_and_the_newest_version_is_served(served):
    with triton_http.InferenceServerClient(served.http) as client:
        assert {model for model in MODELS if client.is_model_ready(model)} == MODELS
        assert {client.get_model_metadata(model)["versions"][0] for model in MODELS} == {"2"}


def test_pictures_are_prepared_as_in_training_bit_by_bit(client, exports):
    found = asked(client, "preprocess", "image", PICTURES, "pixel_values")
    np.testing.assert_array_equal(found, pixels_of(read_export(exports[1]), PICTURES))


def test_texts_become_the_ids_of_training_and_long_ones_are_cut(client, exports):
    exported = read_export(exports[1])
    found = asked(client, "tokenize", "text", [text.encode() for text in TEXTS], "input_ids")
    np.testing.assert_array_equal(found, tokenizer_from_spec(exported.tokenizer.model_dump())(TEXTS))


def test_embeddings_are_onnx_runtimes_over_http_and_grpc(served, client, exports):
    exported = read_export(exports[1])
    images = embeds_of(exported, "image", pixels_of(exported, PICTURES))
    texts = embeds_of(exported, "text", tokenizer_from_spec(exported.tokenizer.model_dump())(TEXTS))
    encoded = [text.encode() for text in TEXTS]
    with triton_http.InferenceServerClient(served.http) as http:
        for library, one in ((triton_grpc, client), (triton_http, http)):
            found = asked(one, "embed_image", "image", PICTURES, "image_embeds", library)
            np.testing.assert_allclose(found, images, atol=1e-6)
            np.testing.assert_allclose(
                asked(one, "embed_text", "text", encoded, "text_embeds", library), texts, atol=1e-6
            )


@pytest.mark.parametrize("templates", [None, ["{}", "a blurry {}.", "set {0} of {}"]])
def test_classes_have_the_probabilities_of_local_inference(client, exports, templates):
    labels = ["cat", "red fox", "Käfer"]
    told = {} if templates is None else {"templates": templates}
    expected = LoadedModel(exports[1], threads=1).classify(PICTURES, labels, **told)
    for _ in range(2):  # computed, then remembered
        np.testing.assert_allclose(classified(client, PICTURES, labels, templates), expected, atol=1e-6)


def test_more_pictures_and_labels_than_a_batch_are_classified(client, exports):
    labels, pictures = [f"thing {n}" for n in range(45)], [picture(seed) for seed in range(11)]
    expected = LoadedModel(exports[1], threads=1).classify(pictures, labels)
    np.testing.assert_allclose(classified(client, pictures, labels), expected, atol=1e-6)


def test_requests_that_wait_together_are_one_run_and_are_answered_apart(client, exports):
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, PICTURES))
    before = executions(client, "image_encoder")
    with concurrent.futures.ThreadPoolExecutor(len(PICTURES)) as pool:
        found = list(
            pool.map(lambda file: asked(client, "embed_image", "image", [file], "image_embeds")[0], PICTURES * 8)
        )
    runs, rows = np.subtract(executions(client, "image_encoder"), before)
    assert rows == 8 * len(PICTURES) and runs < rows / 2
    np.testing.assert_allclose(found, np.tile(expected, (8, 1)), atol=1e-6)


def bomb():
    """A PNG whose header says more pixels than are decoded, and which has none."""
    file = bytearray(picture(0))
    file[16:24] = (int(MAX_PIXELS**0.5) + 1).to_bytes(4, "big") * 2
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


@pytest.mark.parametrize(
    "bad, told",
    [
        (b"no picture", "not a readable image"),
        (b"", "not a readable image"),
        (PICTURES[1][:200], "not a readable image"),
        (bomb(), "expected at most 128,000,000 pixels"),
    ],
    ids=["text", "nothing", "cut", "bomb"],
)
def test_a_picture_that_cannot_be_read_is_an_error_of_its_request_alone(client, exports, bad, told):
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, PICTURES))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        *good, found = pool.map(partial(embedded_or_error, client), [*PICTURES, bad])
    assert isinstance(found, InferenceServerException) and told in str(found)
    np.testing.assert_allclose(good, expected, atol=1e-6)


def test_a_text_that_is_no_utf8_is_an_error_of_its_request_alone(client):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        bad = pool.submit(asked, client, "embed_text", "text", [b"\xff\xfe"], "text_embeds")
        good = pool.submit(asked, client, "embed_text", "text", [b"a cat"], "text_embeds")
        assert good.result().shape[0] == 1
        with pytest.raises(InferenceServerException, match="UTF-8"):
            bad.result()


@pytest.mark.parametrize(
    "images, labels, templates, told",
    [
        ([b"no picture"], ["cat"], None, "not a readable image"),
        ([PICTURES[0]], ["cat", "cat"], None, "repeated ones: cat"),
        ([PICTURES[0]], ["cat"], ["a photo"], "no {}"),
        ([], ["cat"], None, "at least one"),
        ([PICTURES[0]], ["a", "b"] + [str(n) for n in range(998)], ["{}" + "!" * n for n in range(101)], "prompts"),
    ],
    ids=["picture", "labels", "template", "nothing", "too many"],
)
def test_a_bad_question_is_told_and_the_next_one_answered(client, images, labels, templates, told):
    with pytest.raises(InferenceServerException, match=told):
        classified(client, images, labels, templates)
    assert classified(client, PICTURES, ["cat", "dog"]).shape == (len(PICTURES), 2)


def test_more_rows_than_a_batch_are_refused(client):
    with pytest.raises(InferenceServerException, match="batch-size must be <= 8"):
        asked(client, "embed_text", "text", [b"cat"] * 9, "text_embeds")


def test_the_bytes_of_a_file_are_a_request(served, exports):
    exported = read_export(exports[1])
    url = f"http://{served.http}/v2/models/embed_image/infer"
    headers = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url, PICTURES[1], headers)) as answer:
        length = int(answer.headers["Inference-Header-Content-Length"])
        content = answer.read()
    assert json.loads(content[:length])["outputs"][0]["name"] == "image_embeds"
    expected = embeds_of(exported, "image", pixels_of(exported, [PICTURES[1]]))
    np.testing.assert_allclose(np.frombuffer(content[length:], np.float32)[None], expected, atol=1e-6)


def test_the_program_on_the_repositorys_page_tells_what_local_inference_does(served, exports, tmp_path):
    page = (served.repository / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("localhost:8001", served.grpc)
    (tmp_path / "ask.py").write_text(program, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(PICTURES[0])
    command = [sys.executable, tmp_path / "ask.py", tmp_path / "picture.png", "cat", "red fox"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (row,) = LoadedModel(exports[1], threads=1).classify([PICTURES[0]], ["cat", "red fox"])
    assert printed.splitlines() == [f"cat {row[0]:.1%}", f"red fox {row[1]:.1%}"]


def test_a_running_server_is_rolled_back_without_a_stop(served, client, exports):
    def serve(version):
        found = serve_version(served.repository, version, SETTINGS)
        for model in ("embed_image", "embed_text", "classify"):  # the first two bring what they are made of
            served.load(model)
        return found, {tuple(client.get_model_metadata(model).versions) for model in MODELS}

    newer = classified(client, PICTURES, ["cat", "dog"])
    try:
        assert serve(None) == (1, {("1",)})
        images = asked(client, "embed_image", "image", PICTURES, "image_embeds")
        older = classified(client, PICTURES, ["cat", "dog"])
    finally:
        assert serve(2) == (2, {("2",)})
    old = read_export(exports[0])
    np.testing.assert_allclose(images, embeds_of(old, "image", pixels_of(old, PICTURES)), atol=1e-6)
    for export, found in zip(exports, (older, newer), strict=True):
        expected = LoadedModel(export, threads=1).classify(PICTURES, ["cat", "dog"])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(older - newer).max() > 1e-4


def test_a_text_that_was_asked_before_comes_from_the_cache_where_one_is_asked_for(triton, exports, tmp_path):
    settings = SETTINGS.model_copy(update={"text_cache_mb": 4})
    (repository,) = triton_repo_from_export(exports[1], tmp_path, settings)
    for model in MODELS - {"text_encoder"}:
        shutil.rmtree(repository / model)
    exported = read_export(exports[1])
    ids = tokenizer_from_spec(exported.tokenizer.model_dump())(TEXTS[:2])
    with TritonServer(repository, triton=triton) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        before = executions(client, "text_encoder")[0]
        for _ in range(3):
            given = triton_grpc.InferInput("input_ids", list(ids.shape), "INT64")
            given.set_data_from_numpy(ids)
            found = client.infer("text_encoder", [given]).as_numpy("text_embeds")
            np.testing.assert_array_equal(found, embeds_of(exported, "text", ids))
        assert executions(client, "text_encoder")[0] == before + 1


@pytest.fixture(scope="module")
def fused(triton, exports, tmp_path_factory):
    """A server whose embed_* run the very small encoders themselves, in two instances each."""
    folder = tmp_path_factory.mktemp("fused")
    bench = measured(folder / "results.json", read_export(exports[1]).lineage_hash, image=0.2, text=0.2)
    settings = SETTINGS.model_copy(update={"instances": 2})
    (repository,) = triton_repo_from_export(exports[1], folder / "triton", settings, bench)
    with TritonServer(repository, triton=triton) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        yield server, client


def test_a_very_small_encoder_answers_the_same_where_its_input_is_prepared(fused, exports):
    _, client = fused
    exported = read_export(exports[1])
    images = embeds_of(exported, "image", pixels_of(exported, PICTURES))
    texts = embeds_of(exported, "text", tokenizer_from_spec(exported.tokenizer.model_dump())(TEXTS))
    encoded = [text.encode() for text in TEXTS]
    np.testing.assert_allclose(asked(client, "embed_image", "image", PICTURES, "image_embeds"), images, atol=1e-6)
    np.testing.assert_allclose(asked(client, "embed_text", "text", encoded, "text_embeds"), texts, atol=1e-6)
    labels = ["cat", "red fox"]
    expected = LoadedModel(exports[1], threads=1).classify(PICTURES, labels)
    np.testing.assert_allclose(classified(client, PICTURES, labels), expected, atol=1e-6)


def test_there_too_requests_are_one_run_and_a_bad_one_fails_alone(fused, exports):
    _, client = fused
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, PICTURES))

    runs = {model: np.asarray(executions(client, model)) for model in ("embed_image", "image_encoder")}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        *good, bad = pool.map(partial(embedded_or_error, client), [*PICTURES * 8, PICTURES[1][:200]])
    assert isinstance(bad, InferenceServerException) and "not a readable image" in str(bad)
    np.testing.assert_allclose(good, np.tile(expected, (8, 1)), atol=1e-6)
    batches, rows = np.asarray(executions(client, "embed_image")) - runs["embed_image"]
    assert rows == 8 * len(PICTURES) + 1 and batches < rows / 2
    assert executions(client, "image_encoder") == tuple(runs["image_encoder"])


def test_a_lone_client_is_answered_by_the_first_instance(fused):
    """Instances that take turns would find their caches cold."""
    server, client = fused

    def waits():
        """How often each process of embed_image has waited for something."""
        return {
            name: int(re.search(r"\nvoluntary_ctxt_switches:\t(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
            for pid, name in processes(server).items()
            if name.startswith("embed_image_")
        }

    before = waits()
    for _ in range(200):
        asked(client, "embed_image", "image", PICTURES[:1], "image_embeds")
    first, other = (after - before[name] for name, after in sorted(waits().items()))
    assert first >= 200 > 10 * other


def test_a_model_of_several_instances_is_loaded_again_when_one_was_killed(fused, exports):
    server, client = fused
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, PICTURES[:1]))
    (pid,) = (pid for pid, name in processes(server).items() if name == "embed_image_0_0")
    os.kill(pid, signal.SIGKILL)
    server.load("embed_image")
    for _ in range(3):
        found = asked(client, "embed_image", "image", PICTURES[:1], "image_embeds")
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_nearest_pictures_of_an_index_are_found_as_they_are_here(triton, exports, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, content in enumerate(PICTURES):
        (pictures / f"{number}-größe.png").write_bytes(content)
    index_pictures(str(pictures), exports[1], tmp_path / "index", say=lambda _: None)
    settings = SETTINGS.model_copy(update={"index": tmp_path / "index"})
    (repository,) = triton_repo_from_export(exports[1], tmp_path / "triton", settings)
    for model in ("image_encoder", "preprocess", "embed_image", "classify"):
        shutil.rmtree(repository / model)
    exported = read_export(exports[1])
    ids = tokenizer_from_spec(exported.tokenizer.model_dump())(TEXTS[:1])
    scores, (keys,) = open_index(tmp_path / "index").search(embeds_of(exported, "text", ids), 3)
    with TritonServer(repository, triton=triton) as server:
        for address in (f"http://{server.http}", f"grpc://{server.grpc}"):
            with Client(address) as client:
                found = client.search(TEXTS[0], 3)
            assert [hit.key for hit in found] == keys
            np.testing.assert_allclose([hit.score for hit in found], scores[0], atol=1e-6)
