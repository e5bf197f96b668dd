"""The repository on a real Triton: the server's answers are those of local inference with the same files.

Skipped if no server can be installed. The tests share a server whose repository has two versions; the second is served.
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
from small_exports import write_classifier, write_questions, write_segmenter
from triton_requests import (
    IMAGES,
    MODELS,
    SETTINGS,
    classify,
    column,
    embed_or_error,
    embeds_of,
    executions,
    infer,
    pixels_of,
    processes,
    random_image,
    tensor,
    write_latencies,
)
from tritonclient.utils import InferenceServerException

from clipress.data.transforms import MAX_PIXELS
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import open_session
from clipress.serve.classify import LoadedModel
from clipress.serve.client import Client
from clipress.serve.index import open_index
from clipress.serve.indexing import index_images
from clipress.serve.segment import shares_of
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


def test_images_are_preprocessed_bitwise_as_in_training(client, exports):
    found = infer(client, "preprocess", "image", IMAGES, "pixel_values")
    np.testing.assert_array_equal(found, pixels_of(read_export(exports[1]), IMAGES))


def test_texts_are_tokenized_and_truncated_as_in_training(client, exports):
    exported = read_export(exports[1])
    found = infer(client, "tokenize", "text", [text.encode() for text in TEXTS], "input_ids")
    np.testing.assert_array_equal(found, exported.tokenize()(TEXTS))


def test_embeddings_over_http_and_grpc_equal_onnx_runtimes(served, client, exports):
    exported = read_export(exports[1])
    images = embeds_of(exported, "image", pixels_of(exported, IMAGES))
    texts = embeds_of(exported, "text", exported.tokenize()(TEXTS))
    encoded = [text.encode() for text in TEXTS]
    with triton_http.InferenceServerClient(served.http) as http:
        for library, one in ((triton_grpc, client), (triton_http, http)):
            found = infer(one, "embed_image", "image", IMAGES, "image_embeds", library)
            np.testing.assert_allclose(found, images, atol=1e-6)
            np.testing.assert_allclose(
                infer(one, "embed_text", "text", encoded, "text_embeds", library), texts, atol=1e-6
            )


@pytest.mark.parametrize("templates", [None, ["{}", "a blurry {}.", "set {0} of {}"]])
def test_classes_have_the_probabilities_of_local_inference(client, exports, templates):
    labels = ["cat", "red fox", "Käfer"]
    more = {} if templates is None else {"templates": templates}
    expected = LoadedModel(exports[1], threads=1).classify(IMAGES, labels, **more)
    rows = executions(client, "text_encoder")[1]
    for _ in range(2):  # Computed first, then from the cache.
        np.testing.assert_allclose(classify(client, IMAGES, labels, templates), expected, atol=1e-6)
    added = len(labels) * len(templates or [""])
    assert executions(client, "text_encoder", rows + added)[1] == rows + added


def test_more_images_and_labels_than_a_batch_are_classified(client, exports):
    labels, images = [f"thing {n}" for n in range(45)], [random_image(seed) for seed in range(11)]
    expected = LoadedModel(exports[1], threads=1).classify(images, labels)
    np.testing.assert_allclose(classify(client, images, labels), expected, atol=1e-6)


def test_queued_requests_are_batched_and_answered_separately(client, exports):
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, IMAGES))
    before = executions(client, "image_encoder")
    with concurrent.futures.ThreadPoolExecutor(len(IMAGES)) as pool:
        found = list(
            pool.map(lambda file: infer(client, "embed_image", "image", [file], "image_embeds")[0], IMAGES * 8)
        )
    runs, rows = np.subtract(executions(client, "image_encoder", before[1] + 8 * len(IMAGES)), before)
    assert rows == 8 * len(IMAGES) and runs < rows / 2
    np.testing.assert_allclose(found, np.tile(expected, (8, 1)), atol=1e-6)


def bomb():
    """Return a PNG whose header says more pixels than are decoded, and which has none."""
    file = bytearray(random_image(0))
    file[16:24] = (int(MAX_PIXELS**0.5) + 1).to_bytes(4, "big") * 2
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


@pytest.mark.parametrize(
    "bad, message",
    [
        (b"no image", "not a readable image"),
        (b"", "not a readable image"),
        (IMAGES[1][:200], "not a readable image"),
        (bomb(), "expected at most 128,000,000 pixels"),
    ],
    ids=["text", "nothing", "cut", "bomb"],
)
def test_an_unreadable_image_fails_only_its_own_request(client, exports, bad, message):
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, IMAGES))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        *good, found = pool.map(partial(embed_or_error, client), [*IMAGES, bad])
    assert isinstance(found, InferenceServerException) and message in str(found)
    np.testing.assert_allclose(good, expected, atol=1e-6)


def test_a_text_that_is_not_utf8_fails_only_its_own_request(client):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        bad = pool.submit(infer, client, "embed_text", "text", [b"\xff\xfe"], "text_embeds")
        good = pool.submit(infer, client, "embed_text", "text", [b"a cat"], "text_embeds")
        assert good.result().shape[0] == 1
        with pytest.raises(InferenceServerException, match="UTF-8"):
            bad.result()


@pytest.mark.parametrize(
    "images, labels, templates, message",
    [
        ([b"no image"], ["cat"], None, "not a readable image"),
        ([IMAGES[0]], ["cat", "cat"], None, "repeated ones"),
        ([IMAGES[0]], ["cat"], ["a photo"], "no {}"),
        ([], ["cat"], None, "at least one"),
        ([IMAGES[0]], ["a", "b"] + [str(n) for n in range(998)], ["{}" + "!" * n for n in range(101)], "prompts"),
    ],
    ids=["image", "labels", "template", "nothing", "too many"],
)
def test_a_bad_request_is_refused_and_the_next_one_answered(client, images, labels, templates, message):
    with pytest.raises(InferenceServerException, match=message):
        classify(client, images, labels, templates)
    assert classify(client, IMAGES, ["cat", "dog"]).shape == (len(IMAGES), 2)


@pytest.mark.parametrize(("number", "words"), [(10**9, "out of data bounds"), (-1, "expected numbers of 0 or more")])
def test_bad_ids_in_a_batch_fail_only_their_own_request(client, exports, number, words):
    exported = read_export(exports[1])
    good = [exported.tokenize()([text]) for text in TEXTS]
    bad = np.full_like(good[0], number)

    def encode(ids):
        try:
            inputs = [tensor(triton_grpc, "input_ids", ids, "INT64")]
            return client.infer("text_encoder", inputs).as_numpy("text_embeds")
        except InferenceServerException as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        first, *found, last = pool.map(encode, [bad, *good * 2, bad])
    for error in (first, last):
        assert error.status() == "StatusCode.INVALID_ARGUMENT" and words in str(error)
    np.testing.assert_allclose(found, [embeds_of(exported, "text", ids) for ids in good * 2], atol=1e-6)


def test_a_configuration_that_warms_up_with_random_numbers_is_still_served(triton, exports, tmp_path):
    """As earlier releases wrote it: there are NaN among the numbers."""
    (repository,) = triton_repo_from_export(exports[0], tmp_path, SETTINGS)
    config = repository / "image_encoder" / "config.pbtxt"
    written = config.read_text()
    config.write_text(written.replace("zero_data: true", "random_data: true"))
    assert config.read_text() != written
    with TritonServer(repository, triton=triton) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        pixels = tensor(triton_grpc, "pixel_values", np.zeros((1, 3, 32, 32), np.float32), "FP32")
        assert np.isfinite(client.infer("image_encoder", [pixels]).as_numpy("image_embeds")).all()


def test_more_rows_than_a_batch_are_refused(client):
    with pytest.raises(InferenceServerException, match="batch-size must be <= 8"):
        infer(client, "embed_text", "text", [b"cat"] * 9, "text_embeds")


def test_the_bytes_of_a_file_are_a_request_body(served, exports):
    exported = read_export(exports[1])
    url = f"http://{served.http}/v2/models/embed_image/infer"
    headers = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url, IMAGES[1], headers)) as answer:
        length = int(answer.headers["Inference-Header-Content-Length"])
        content = answer.read()
    assert json.loads(content[:length])["outputs"][0]["name"] == "image_embeds"
    expected = embeds_of(exported, "image", pixels_of(exported, [IMAGES[1]]))
    np.testing.assert_allclose(np.frombuffer(content[length:], np.float32)[None], expected, atol=1e-6)


def test_the_program_in_the_readme_prints_the_result_of_local_inference(served, exports, tmp_path):
    page = (served.repository / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("localhost:8001", served.grpc)
    (tmp_path / "classify.py").write_text(program, encoding="utf-8")
    (tmp_path / "image.png").write_bytes(IMAGES[0])
    command = [sys.executable, tmp_path / "classify.py", tmp_path / "image.png", "cat", "red fox"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (row,) = LoadedModel(exports[1], threads=1).classify([IMAGES[0]], ["cat", "red fox"])
    assert printed.splitlines() == [f"cat {row[0]:.1%}", f"red fox {row[1]:.1%}"]


def test_a_running_server_is_rolled_back_without_a_stop(served, client, exports):
    def serve(version):
        found = serve_version(served.repository, version, SETTINGS)
        for model in ("embed_image", "embed_text", "classify"):  # The first two load the models that they chain.
            served.load(model)
        return found, {tuple(client.get_model_metadata(model).versions) for model in MODELS}

    newer = classify(client, IMAGES, ["cat", "dog"])
    try:
        assert serve(None) == (1, {("1",)})
        images = infer(client, "embed_image", "image", IMAGES, "image_embeds")
        older = classify(client, IMAGES, ["cat", "dog"])
    finally:
        assert serve(2) == (2, {("2",)})
    old = read_export(exports[0])
    np.testing.assert_allclose(images, embeds_of(old, "image", pixels_of(old, IMAGES)), atol=1e-6)
    for export, found in zip(exports, (older, newer), strict=True):
        expected = LoadedModel(export, threads=1).classify(IMAGES, ["cat", "dog"])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(older - newer).max() > 1e-4


def test_a_repeated_text_comes_from_the_cache_if_there_is_one(triton, exports, tmp_path):
    settings = SETTINGS.model_copy(update={"text_cache_mb": 4})
    (repository,) = triton_repo_from_export(exports[1], tmp_path, settings)
    for model in MODELS - {"text_encoder"}:
        shutil.rmtree(repository / model)
    exported = read_export(exports[1])
    ids = exported.tokenize()(TEXTS[:2])
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
    """Start a server whose embed_* run the very small encoders themselves, in two instances each."""
    folder = tmp_path_factory.mktemp("fused")
    bench = write_latencies(folder / "results.json", read_export(exports[1]).lineage_hash, image=0.2, text=0.2)
    settings = SETTINGS.model_copy(update={"instances": 2})
    (repository,) = triton_repo_from_export(exports[1], folder / "triton", settings, bench)
    with TritonServer(repository, triton=triton) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        yield server, client


def test_a_fused_model_answers_as_the_chain_does(fused, exports):
    _, client = fused
    exported = read_export(exports[1])
    images = embeds_of(exported, "image", pixels_of(exported, IMAGES))
    texts = embeds_of(exported, "text", exported.tokenize()(TEXTS))
    encoded = [text.encode() for text in TEXTS]
    np.testing.assert_allclose(infer(client, "embed_image", "image", IMAGES, "image_embeds"), images, atol=1e-6)
    np.testing.assert_allclose(infer(client, "embed_text", "text", encoded, "text_embeds"), texts, atol=1e-6)
    labels = ["cat", "red fox"]
    expected = LoadedModel(exports[1], threads=1).classify(IMAGES, labels)
    np.testing.assert_allclose(classify(client, IMAGES, labels), expected, atol=1e-6)


def test_a_fused_model_batches_requests_and_only_bad_ones_fail(fused, exports):
    _, client = fused
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, IMAGES))

    runs = {model: np.asarray(executions(client, model)) for model in ("embed_image", "image_encoder")}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        *good, bad = pool.map(partial(embed_or_error, client), [*IMAGES * 8, IMAGES[1][:200]])
    assert isinstance(bad, InferenceServerException) and "not a readable image" in str(bad)
    np.testing.assert_allclose(good, np.tile(expected, (8, 1)), atol=1e-6)
    added = 8 * len(IMAGES) + 1
    batches, rows = executions(client, "embed_image", runs["embed_image"][1] + added) - runs["embed_image"]
    assert rows == added and batches < rows / 2
    assert executions(client, "image_encoder") == tuple(runs["image_encoder"])


def test_a_lone_client_is_answered_by_the_first_instance(fused):
    """Instances that took turns would find their caches cold."""
    server, client = fused

    def waits():
        """Return how often each process of embed_image has waited for something."""
        return {
            name: int(re.search(r"\nvoluntary_ctxt_switches:\t(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
            for pid, name in processes(server).items()
            if name.startswith("embed_image_")
        }

    before = waits()
    for _ in range(200):
        infer(client, "embed_image", "image", IMAGES[:1], "image_embeds")
    first, other = (after - before[name] for name, after in sorted(waits().items()))
    assert first >= 200 > 10 * other


def test_a_model_of_several_instances_is_loaded_again_after_one_was_killed(fused, exports):
    server, client = fused
    exported = read_export(exports[1])
    expected = embeds_of(exported, "image", pixels_of(exported, IMAGES[:1]))
    (pid,) = (pid for pid, name in processes(server).items() if name == "embed_image_0_0")
    os.kill(pid, signal.SIGKILL)
    server.load("embed_image")
    for _ in range(3):
        found = infer(client, "embed_image", "image", IMAGES[:1], "image_embeds")
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_search_finds_the_nearest_images_of_the_index(triton, exports, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, content in enumerate(IMAGES):
        (images / f"{number}-größe.png").write_bytes(content)
    index_images(str(images), exports[1], tmp_path / "index", say=lambda _: None)
    settings = SETTINGS.model_copy(update={"index": tmp_path / "index"})
    (repository,) = triton_repo_from_export(exports[1], tmp_path / "triton", settings)
    for model in ("image_encoder", "preprocess", "embed_image", "classify"):
        shutil.rmtree(repository / model)
    exported = read_export(exports[1])
    ids = exported.tokenize()(TEXTS[:1])
    scores, (keys,) = open_index(tmp_path / "index").search(embeds_of(exported, "text", ids), 3)
    with TritonServer(repository, triton=triton) as server:
        for address in (f"http://{server.http}", f"grpc://{server.grpc}"):
            with Client(address) as client:
                found = client.search(TEXTS[0], 3)
            assert [hit.key for hit in found] == keys
            np.testing.assert_allclose([hit.score for hit in found], scores[0], atol=1e-6)
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            texts = tensor(triton_grpc, "text", np.asarray([text.encode() for text in TEXTS], object))
            assert client.infer("search", [texts]).as_numpy("keys").shape == (len(TEXTS), len(IMAGES))
            with pytest.raises(InferenceServerException, match="k: expected 1 or more, found 0"):
                client.infer("search", [texts, tensor(triton_grpc, "k", np.zeros(1, np.int32), "INT32")])


# --- other tasks than CLIP ---


@pytest.mark.parametrize("small", [False, True], ids=["chained", "fused"])
def test_a_classifier_gives_the_probabilities_of_local_inference(triton, tmp_path, small):
    export = write_classifier(tmp_path / "export")
    bench = write_latencies(tmp_path / "results.json", image=0.2 if small else 2)
    (repository,) = triton_repo_from_export(export, tmp_path / "triton", SETTINGS, bench)
    local = LoadedModel(export, threads=1)
    images = IMAGES * 2  # More than a batch.
    expected = local.classify(images)
    with TritonServer(repository, triton=triton) as server:
        for address in (f"http://{server.http}", f"grpc://{server.grpc}"):
            with Client(address) as client:
                assert client.labels() == list(local.labels)
                found = client.classify([*images, b"no image"])
            np.testing.assert_allclose(found.values[:-1], expected, atol=1e-6)
            assert found.errors.keys() == {len(images)} and "not a readable image" in found.errors[len(images)]
        page = (repository / "README.md").read_text(encoding="utf-8")
        program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("localhost:8001", server.grpc)
        (tmp_path / "classify.py").write_text(program, encoding="utf-8")
        (tmp_path / "image.png").write_bytes(IMAGES[0])
        command = [sys.executable, tmp_path / "classify.py", tmp_path / "image.png"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    best = np.argsort(-expected[0])
    assert printed == [f"{local.labels[number]} {expected[0][number]:.1%}" for number in best]


def test_a_segmenter_gives_the_mask_of_local_inference(triton, tmp_path):
    export = write_segmenter(tmp_path / "export")
    (repository,) = triton_repo_from_export(export, tmp_path / "triton", SETTINGS)
    local = LoadedModel(export, threads=1)
    with TritonServer(repository, triton=triton) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        for file in IMAGES[:2]:
            answer = client.infer("segment", [tensor(triton_grpc, "image", np.asarray([file], object))])
            np.testing.assert_array_equal(answer.as_numpy("mask"), local.segment(file)[0])
            assert [label.decode() for label in answer.as_numpy("labels")] == list(local.labels)
        with pytest.raises(InferenceServerException, match="not a readable image"):
            client.infer("segment", [tensor(triton_grpc, "image", np.asarray([b"no image"], object))])
        page = (repository / "README.md").read_text(encoding="utf-8")
        program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("localhost:8001", server.grpc)
        (tmp_path / "segment.py").write_text(program, encoding="utf-8")
        (tmp_path / "image.png").write_bytes(IMAGES[0])
        command = [sys.executable, tmp_path / "segment.py", tmp_path / "image.png"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    shares = shares_of(local.segment(IMAGES[0])[0], local.labels)
    assert sorted(printed) == sorted(f"{label} {share:.1%}" for label, share in shares.items())


def test_a_graph_of_several_inputs_is_served_from_files_and_numbers(triton, tmp_path):
    export = write_questions(tmp_path / "export")
    exported = read_export(export)
    (repository,) = triton_repo_from_export(export, tmp_path / "triton", SETTINGS)
    texts, weights = TEXTS[:3], np.asarray([[0.5], [2], [-1]], np.float32)
    inputs = {
        "pixel_values": pixels_of(exported, IMAGES[:3]),
        "input_ids": exported.tokenize()(texts),
        "weight": weights,
    }
    expected = open_session(exported.onnx("question"), 1).run(["question_embeds", "difference"], inputs)
    given = [
        tensor(triton_grpc, "image", column(IMAGES[:3])),
        tensor(triton_grpc, "text", column([text.encode() for text in texts])),
        tensor(triton_grpc, "weight", weights, "FP32"),
    ]
    with TritonServer(repository, triton=triton) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        found = client.infer("embed_question", given)
    for name, rows in zip(("question_embeds", "difference"), expected, strict=True):
        np.testing.assert_allclose(found.as_numpy(name), rows, rtol=1e-5)
