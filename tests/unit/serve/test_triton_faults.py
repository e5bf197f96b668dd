"""Faults and abuse of a real Triton: each is an error of its own request, and the server keeps working.

After every one a good image and a good text must get bit by bit the embeddings of local inference, and all processes of
the server together must not have grown much. With CLIPRESS_FAULTS=FILE the responses are written to that file as JSON.
"""

import concurrent.futures
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from PIL import Image
from triton_requests import (
    IMAGES,
    SETTINGS,
    embed_or_error,
    embeds_of,
    executions,
    infer,
    pixels_of,
    processes,
    random_image,
    tensor,
)
from tritonclient.utils import InferenceServerException

from clipress.errors import ServerError
from clipress.runtime.export_folder import read_export
from clipress.serve.classify import LoadedModel
from clipress.serve.client import Client
from clipress.serve.triton_repo import triton_repo_from_export
from clipress.serve.triton_server import TritonServer

GRPC = {400: "StatusCode.INVALID_ARGUMENT", 404: "StatusCode.NOT_FOUND", 503: "StatusCode.UNAVAILABLE"}
GROWTH = 64 << 20  # Allowed growth in bytes over this whole file; a decompression bomb would take a gigabyte.


class Local:
    """The export without a server."""

    def __init__(self, export):
        self.export, self.exported = export, read_export(export)
        self.tokenize = self.exported.tokenize()

    def images(self, *files):
        return embeds_of(self.exported, "image", pixels_of(self.exported, files))

    def texts(self, *texts):
        return embeds_of(self.exported, "text", self.tokenize(texts))


@pytest.fixture(scope="module")
def local(exports):
    return Local(exports[1])


@pytest.fixture(scope="module")
def client(served):
    with triton_grpc.InferenceServerClient(served.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def http(served):
    with triton_http.InferenceServerClient(served.http) as client:
        yield client


@pytest.fixture(scope="module")
def rows():
    found = []
    yield found
    if file := os.environ.get("CLIPRESS_FAULTS"):
        Path(file).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture
def happened(rows):
    """Record the response to a fault."""
    return lambda fault, expected, came: rows.append({"fault": fault, "expected": expected, "happened": came})


def memory(server, field="VmRSS"):
    """Return the memory of a server and its models' processes in bytes; VmHWM is their peak."""
    total = 0
    for pid in processes(server):
        with suppress(OSError):
            (line,) = (
                one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith(f"{field}:")
            )
            total += int(line.split()[1]) << 10
    return total


@pytest.fixture(scope="module")
def at_first(served, client, local):
    """Return the server's memory after every model has run."""
    healthy(client, local, "first")
    return memory(served)


def healthy(client, local, name):
    """Send a good image, and a text that was not sent before."""
    text = f"a photo of {name}"
    np.testing.assert_array_equal(
        infer(client, "embed_image", "image", [IMAGES[1]], "image_embeds"), local.images(IMAGES[1])
    )
    np.testing.assert_array_equal(
        infer(client, "embed_text", "text", [text.encode()], "text_embeds"), local.texts(text)
    )


@pytest.fixture(autouse=True)
def goes_on(request, served, client, local, at_first):
    yield
    healthy(client, local, request.node.name)
    assert memory(served) < at_first + GROWTH


def refusal(call):
    """Return (status, message) of a refused request."""
    with pytest.raises(InferenceServerException) as error:
        call()
    return str(error.value.status()), error.value.message()


def lines(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def jpeg_cut():
    file = random_image(3, "JPEG", (200, 300))
    return file[: len(file) // 2]


@cache
def huge():
    """Return a complete PNG of 400 million pixels, 50 kB as a file."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def image(content):
    return {"image": lines(content)[:, None]}


def text(content):
    return {"text": lines(content)[:, None]}


def pixels(value):
    """Return the pixels of two images; a single one of the second is not a number."""
    rows = np.zeros((2, 3, 32, 32), np.float32)
    rows[1, 2, 5, 7] = value
    return {"pixel_values": rows}


def classes(labels, images=(IMAGES[0],), **more):
    return {"image": lines(*images), "labels": lines(*labels), **more}


EMPTY = np.empty((0, 1), object)
REFUSED = {
    "a truncated JPEG": ("embed_image", image(jpeg_cut()), 400, "not a readable image"),
    "20,000 x 20,000 pixels": ("embed_image", image(huge()), 400, "expected at most 128,000,000 pixels"),
    "a text file as an image": ("embed_image", image(b"Dear Sir or Madam"), 400, "not a readable image"),
    "an empty image": ("embed_image", image(b""), 400, "not a readable image"),
    "a bad image to classify": ("classify", classes([b"a", b"b"], [IMAGES[0], b"no"]), 400, "not a readable image"),
    "a batch without images": ("embed_image", {"image": EMPTY}, 400, "expected 1 string elements"),
    "a batch without texts": ("embed_text", {"text": EMPTY}, 400, "expected 1 string elements"),
    "no images to classify": ("classify", classes([b"a"], []), 400, "image: expected at least one entry"),
    "no labels": ("classify", classes([]), 400, "labels: expected at least one entry"),
    "a text that is not UTF-8": ("embed_text", text(b"caf\xe9"), 400, "text: expected UTF-8"),
    "a label that is not UTF-8": ("classify", classes([b"cat", b"\xff"]), 400, "labels: expected UTF-8"),
    "a text of 100,001 letters": ("embed_text", text(b"a" * 100_001), 400, "expected at most 100,000 characters"),
    "a repeated label": ("classify", classes([b"cat", b"cat"]), 400, "repeated ones: cat"),
    "100,001 labels": (
        "classify",
        classes([b"%d" % n for n in range(100_001)]),
        400,
        "Expected at most 100,000 prompts",
    ),
    "numbers as a text": ("embed_text", {"text": np.zeros((1, 1), np.float32)}, 400, "expects 'BYTES'"),
    "pixels as an image": ("embed_image", {"image": np.zeros((1, 32, 32, 3), np.uint8)}, 400, "expects 'BYTES'"),
    "an image without a batch": ("embed_image", {"image": lines(IMAGES[0])}, 400, "Expected [-1,1], got [1]"),
    "pixels of another size": ("image_encoder", {"pixel_values": np.zeros((1, 3, 7, 7), np.float32)}, 400, "shape"),
    "an unknown input name": (
        "embed_text",
        {"texts": lines(b"cat")[:, None]},
        400,
        "unexpected inference input 'texts'",
    ),
    "one input too many": ("embed_text", {**text(b"cat"), "more": EMPTY}, 400, "expected 1 inputs but got 2"),
    "a missing required input": ("classify", {"labels": lines(b"cat")}, 400, "missing required input(s) ['image']"),
    "an unknown model": ("embed_audio", text(b"cat"), 404, "unknown model: 'embed_audio'"),
    "a word outside the vocabulary": ("text_encoder", {"input_ids": 10**9}, 400, "out of data bounds"),
    "a negative token id": (
        "text_encoder",
        {"input_ids": -1},
        400,
        "input_ids: expected numbers of 0 or more, found -1",
    ),
    "pixels that are NaN": ("image_encoder", pixels(np.nan), 400, "pixel_values: expected finite numbers, found nan"),
    "infinite pixels": ("image_encoder", pixels(-np.inf), 400, "pixel_values: expected finite numbers, found -inf"),
}
KINDS = {"O": "BYTES", "f": "FP32", "u": "UINT8", "i": "INT64"}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_invalid_request_is_refused_with_a_reason(served, client, http, local, happened, fault):
    model, inputs, status, words = REFUSED[fault]
    if "input_ids" in inputs:
        inputs = {"input_ids": np.full((1, local.exported.tokenizer.context_length), inputs["input_ids"])}
    before = memory(served)
    # Sent twice: a cached error must not become an empty answer.
    for library, one in ((triton_grpc, client), (triton_http, http)) * 2:
        tensors = [tensor(library, name, array, KINDS[array.dtype.kind]) for name, array in inputs.items()]
        found, message = refusal(lambda one=one, tensors=tensors: one.infer(model, tensors))
        assert found == (str(status) if one is http else GRPC[status])
        assert words in message
    assert memory(served) < before + GROWTH
    happened(fault, f"{status}: {words}", f"{found}: {message}")


def test_a_decompression_bomb_is_refused_before_decoding(served, client, happened):
    for pid in processes(served):
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # This resets the peak.
    before = memory(served, "VmHWM")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(refusal, lambda: infer(client, "embed_image", "image", [huge()], "")) for _ in range(8)]
    assert {call.result()[0] for call in calls} == {GRPC[400]}
    grown = memory(served, "VmHWM") - before
    assert grown < GROWTH
    happened("eight bombs of 400 million pixels at once", "400, less than 64 MB", f"400, {grown >> 20} MB")


def test_an_image_of_one_pixel_is_embedded(client, local, happened):
    file = random_image(9, size=(1, 1))
    np.testing.assert_array_equal(infer(client, "embed_image", "image", [file], "image_embeds"), local.images(file))
    happened("an image of 1 x 1 pixels", "the embedding of local inference", "the same bits")


@pytest.mark.parametrize(
    "fault, words",
    [
        ("a caption of 5,000 words", "a photo of a cat " * 1000),
        ("one word of 30,000 letters", "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=30_000))),
        ("one letter 100,000 times", "a" * 100_000),
        ("100,000 characters of all kinds", "&amp;ÃŸ🏳️‍🌈 <|>"[:10] * 10_000),
    ],
)
def test_a_text_that_is_too_long_is_truncated_as_in_training(client, local, happened, fault, words):
    found = infer(client, "embed_text", "text", [words.encode()], "text_embeds")
    np.testing.assert_array_equal(found, local.texts(words))
    happened(fault, "the embedding of local inference", "the same bits")


def test_other_requests_are_answered_while_thousands_of_labels_are_embedded(served, client, local, happened):
    labels = [f"thing {number}" for number in range(10_000)]
    call = triton_grpc.InferenceServerClient(served.grpc)
    inputs = [tensor(triton_grpc, name, array) for name, array in classes([one.encode() for one in labels]).items()]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(lambda: call.infer("classify", inputs).as_numpy("probabilities"))
        others = 0
        while not pending.done():
            healthy(client, local, f"other number {others}")
            others += 1
    call.close()
    expected = LoadedModel(local.export, threads=1).classify([IMAGES[0]], labels)
    np.testing.assert_allclose(pending.result(), expected, atol=1e-6)
    assert others > 1
    happened("10,000 labels", "the probabilities of local inference, others answered meanwhile", f"so, {others} others")


def test_disconnected_clients_leave_nothing_behind(served, client, local, happened):
    """Half of 64 leave before they have sent everything, half before the answer; all with a reset."""
    host, port = served.http.split(":")
    content = random_image(5, "JPEG", (1000, 1000))
    head = (
        f"POST /v2/models/embed_image/infer HTTP/1.1\r\nHost: {host}\r\nInference-Header-Content-Length: 0\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode()

    def vanish(number):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + (content if number % 2 else content[: len(content) // 2]))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(vanish, range(64)))
    known = set(processes(served).values())
    healthy(client, local, "who stayed")
    assert {"preprocess_0_0", "image_encoder_0_0"} <= known == set(processes(served).values())
    happened("64 clients that disconnect", "others are answered", "so; no process is lost")


def outcome(client, file):
    found = embed_or_error(client, file)
    return (str(found.status()), found.message()) if isinstance(found, InferenceServerException) else found


def test_only_the_bad_image_in_a_batch_fails(client, local, happened):
    files = [*IMAGES, jpeg_cut(), *IMAGES[:2]]
    runs = executions(client, "preprocess")
    with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
        found = list(pool.map(lambda file: outcome(client, file), files))
    bad = found.pop(5)
    assert executions(client, "preprocess")[0] - runs[0] < len(files)  # They were batched.
    assert bad[0] == GRPC[400] and "not a readable image" in bad[1]
    np.testing.assert_allclose(found, local.images(*IMAGES, *IMAGES[:2]), atol=1e-6)
    happened("a bad image in a batch of good ones", "only that one fails", f"so: {bad[0]}: {bad[1]}")


@pytest.fixture(scope="module")
def fragile(triton, exports, tmp_path_factory):
    """Start a watched server of the image models alone, with a short queue."""
    settings = SETTINGS.model_copy(update={"queue_size": 4, "max_batch": 1})
    (repository,) = triton_repo_from_export(exports[1], tmp_path_factory.mktemp("fragile"), settings)
    for folder in set(repository.iterdir()) - {
        repository / name for name in ("preprocess", "image_encoder", "embed_image")
    }:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    said, ended = [], []

    def watch(server):
        try:
            server.wait(said.append)
        except ServerError as error:
            ended.append(error)

    with TritonServer(repository, triton=triton) as server:
        watcher = threading.Thread(target=watch, args=[server])
        watcher.start()
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            yield server, client, said
        assert not ended
        os.kill(server.pid, signal.SIGKILL)  # SIGTERM would wait ten seconds for the models whose processes were killed
        watcher.join()


def test_requests_beyond_the_queue_are_refused_and_can_be_retried(fragile, local, happened):
    server, client, _ = fragile
    files = [random_image(number, "PNG", (500, 500)) for number in range(16)]
    expected = local.images(*files)
    with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
        found = list(pool.map(lambda file: outcome(client, file), files))
    refused = [one for one in found if isinstance(one, tuple)]
    assert {status for status, _ in refused} == {GRPC[503]} and "queue" in refused[0][1]
    for one, right in zip(found, expected, strict=True):
        assert isinstance(one, tuple) or np.abs(one - right).max() < 1e-6
    with Client(f"grpc://{server.grpc}", in_flight=len(files), retries=30, delay=0.05) as patient:
        values, errors = patient.embed_images(files)
    assert not errors
    np.testing.assert_allclose(values, expected, atol=1e-6)
    came = f"{len(refused)} refused, {refused[0][0]}: {refused[0][1]}; a client that tries again gets all {len(files)}"
    happened(f"{len(files)} requests where 4 may wait", "503 or the right answer", came)


@pytest.mark.parametrize("model", ["image_encoder", "preprocess"])
def test_a_model_whose_process_is_killed_answers_again(fragile, local, happened, model):
    server, client, said = fragile
    (pid,) = (number for number, name in processes(server).items() if name == f"{model}_0_0")
    os.kill(pid, signal.SIGKILL)
    for attempt in itertools.count(1):
        found = outcome(client, IMAGES[1])
        if not isinstance(found, tuple):
            break
        assert "is not healthy" in found[1] and attempt < 100
        error = found
    np.testing.assert_array_equal(found[None], local.images(IMAGES[1]))
    assert said[-1] == f"A process of {model} has died: it is loaded again."
    happened(
        f"SIGKILL of {model}'s process", "loaded again", f"{error[0]}: {error[1]}, {attempt - 1} times; then right"
    )


def test_a_damaged_new_version_is_not_served(fragile, local, happened):
    server, client, _ = fragile
    old, new = (server.repository / "image_encoder" / version for version in "12")
    shutil.copytree(old, new)
    (new / "model.onnx").write_bytes((old / "model.onnx").read_bytes()[:1000])
    with pytest.raises(ServerError, match="could not load image_encoder: ") as error:
        server.load("image_encoder")
    np.testing.assert_array_equal(outcome(client, IMAGES[1])[None], local.images(IMAGES[1]))
    shutil.rmtree(new)
    server.load("image_encoder")
    np.testing.assert_array_equal(outcome(client, IMAGES[1])[None], local.images(IMAGES[1]))
    happened("a damaged new version", "it is not loaded, the old one stays", str(error.value))
