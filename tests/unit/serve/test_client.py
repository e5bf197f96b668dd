"""The client's requests, retries and errors, against a fake server that fails on demand and a real Triton."""

import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import clipress
from kserve import Refusal, Server
from small_exports import small_image

pytest.importorskip("tritonclient.http.aio", reason="pip install 'clipress[serve]'")

from click.testing import CliRunner

from clipress.errors import DataError, ServerError
from clipress.serve import client as module
from clipress.serve.classify import LoadedModel
from clipress.serve.client import Client, address_from

BAD = b"no image"


def embed(content):
    """Return a vector that depends on all bytes, trailing zeros included."""
    return np.asarray([len(content), sum(content) % 251, content[0] if content else 0], np.float32)


def refuse_bad(contents):
    for content in contents:
        if content.startswith(BAD):
            raise Refusal(400, "bad image: cannot be decoded")


def embed_image(inputs):
    assert inputs["image"].shape == (1, 1)
    refuse_bad(inputs["image"].ravel())
    return {"image_embeds": np.stack([embed(content) for content in inputs["image"][:, 0]])}


def embed_text(inputs):
    return {"text_embeds": np.stack([embed(content) for content in inputs["text"][:, 0]])}


def classify(inputs):
    refuse_bad(inputs["image"])
    lengths = np.asarray(
        [[1 + abs(len(image) - len(label)) for label in inputs["labels"]] for image in inputs["image"]]
    )
    return {"probabilities": lengths / lengths.sum(1, keepdims=True)}


@pytest.fixture
def serve():
    """Start servers with the three models, some of which may be replaced."""
    started = []

    def start(**models):
        started.append(Server(**{"embed_image": embed_image, "embed_text": embed_text, "classify": classify} | models))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def connect():
    """Open clients that hardly wait between attempts."""
    opened = []

    def start(server, **options):
        opened.append(Client(getattr(server, "url", server), **{"delay": 0.001, "timeout": 20} | options))
        return opened[-1]

    yield start
    for client in opened:
        client.close()


def failing(model, times, status):
    """Return the model, except that its first requests get an error status."""
    calls = itertools.count()

    def answer(inputs):
        if next(calls) < times:
            raise Refusal(status, f"status {status}")
        return model(inputs)

    return answer


def test_images_are_sent_as_the_bytes_of_their_files(serve, connect, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x01\x02\x00")
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), b"\x05\x00\x00\x00"]
    values, errors = connect(serve()).embed_images(images)
    np.testing.assert_array_equal(values, [embed(b"\x01\x02\x00")] * 2 + [embed(b"\x05\x00\x00\x00")])
    assert values.dtype == np.float32 and errors == {}


def test_texts_are_sent_as_utf8(serve, connect):
    values, _ = connect(serve()).embed_texts(["größe", ""])
    np.testing.assert_array_equal(values, [embed("größe".encode()), embed(b"")])


def test_answers_come_in_the_order_of_the_items(serve, connect):
    items = [bytes([number]) * (number + 1) for number in range(100)]
    values, _ = connect(serve()).embed_images(iter(items))
    np.testing.assert_array_equal(values, [embed(item) for item in items])


def test_probabilities_are_those_of_the_server(serve, connect):
    images, labels = [b"x" * length for length in range(1, 50)], ["a", "abc", "abcdef"]
    values, errors = connect(serve()).classify(images, labels)
    inputs = {"image": images, "labels": [label.encode() for label in labels]}
    np.testing.assert_allclose(values, classify(inputs)["probabilities"], atol=1e-7)
    assert not errors


def test_templates_are_sent_only_when_they_are_given(serve, connect):
    server = serve()
    client = connect(server)
    client.classify([b"x"], ["a", "b"])
    client.classify([b"x"], ["a", "b"], ["one {}", "two {}"])
    assert [sorted(inputs) for _, inputs in server.requests] == [["image", "labels"], ["image", "labels", "templates"]]
    assert server.requests[1][1]["templates"].tolist() == [b"one {}", b"two {}"]


def test_no_items_give_no_rows(serve, connect):
    server = serve()
    assert connect(server).embed_images([]).values.shape == (0, 0)
    assert connect(server).classify([], ["a", "b"]).values.shape == (0, 2)
    assert not server.requests


@pytest.mark.parametrize("kind", ["embed_images", "classify"])
def test_a_bad_image_is_an_error_and_the_others_are_kept(serve, connect, tmp_path, kind):
    images = [b"\x01", BAD, b"\x02\x02", tmp_path / "none.png", b"\x03"]
    client = connect(serve())
    values, errors = client.embed_images(images) if kind == "embed_images" else client.classify(images, ["a", "bcd"])
    assert errors.keys() == {1, 3} and "bad image" in errors[1] and "none.png cannot be read" in errors[3]
    assert np.isnan(values[[1, 3]]).all()
    good = [b"\x01", b"\x02\x02", b"\x03"]
    wanted = [embed(one) for one in good] if kind == "embed_images" else client.classify(good, ["a", "bcd"]).values
    np.testing.assert_allclose(values[[0, 2, 4]], wanted)


def test_a_bad_image_is_not_sent_again(serve, connect):
    server = serve()
    connect(server).embed_images([BAD])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 500])
def test_a_refused_request_is_not_retried(serve, connect, status):
    server = serve(embed_text=failing(embed_text, 1, status))
    _, errors = connect(server, retries=5).embed_texts(["a"])
    assert errors == {0: f"status {status}"} and len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_request_to_a_busy_server_is_retried(serve, connect, status):
    server = serve(embed_text=failing(embed_text, 3, status))
    values, errors = connect(server, retries=3).embed_texts(["a"])
    assert not errors and len(server.requests) == 4
    np.testing.assert_array_equal(values, [embed(b"a")])


def test_retries_are_limited_and_their_delays_grow(serve, connect, monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    server = serve(embed_text=failing(embed_text, 100, 503))
    with pytest.raises(ServerError, match=r"does not answer: status 503. Is the server running"):
        connect(server, retries=7, delay=0.5).embed_texts(["a"])
    assert waited == [0.5, 1, 2, 4, 8, 10, 10] and len(server.requests) == 8


def test_an_item_refused_by_a_full_server_is_an_error_and_the_others_are_kept(serve, connect):
    def picky(inputs):
        if inputs["text"].ravel()[0] == b"b":
            raise Refusal(503, "no room")
        return embed_text(inputs)

    values, errors = connect(serve(embed_text=picky), retries=1, in_flight=2).embed_texts(["a", "b", "c", "d"])
    assert errors == {1: "no room"} and np.isfinite(values[[0, 2, 3]]).all()


def test_a_server_that_goes_away_ends_the_call(serve, connect):
    server = serve(embed_text=lambda inputs: embed_text(inputs) if len(server.requests) < 4 else refuse())

    def refuse():
        raise Refusal(503, "gone")

    endless = map(str, itertools.count())
    with pytest.raises(ServerError, match="does not answer: gone"):
        connect(server, retries=0, in_flight=3).embed_texts(endless)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_absent_server_is_one_message(serve, connect, protocol):
    server = serve()
    port = server.url.rpartition(":")[2]
    server.close()
    with pytest.raises(ServerError, match="does not answer"):
        connect(f"{protocol}://127.0.0.1:{port}", retries=1).embed_texts(["a", "b"])


def test_an_attempt_ends_after_the_timeout(serve, connect):
    released = threading.Event()
    server = serve(embed_text=lambda inputs: released.wait(20) and embed_text(inputs))
    with pytest.raises(ServerError, match=r"no answer within 0.05 s"):
        connect(server, retries=1, timeout=0.05).embed_texts(["a"])
    released.set()


def test_a_missing_model_ends_the_call_at_once(connect, serve):
    server = serve()
    del server.models["embed_text"]
    with pytest.raises(ServerError, match="has no model 'embed_text'"):
        connect(server).embed_texts(["a"] * 100)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"other": np.zeros((1, 3))}, "gives no probabilities"),
        ({"probabilities": np.zeros((1, 3))}, r"expected \[1, 2\]"),
        ({"probabilities": np.full((1, 2), np.nan)}, "finite"),
    ],
)
def test_an_answer_of_another_form_is_an_error(serve, connect, answer, message):
    with pytest.raises(ServerError, match=message):
        connect(serve(classify=lambda _: answer)).classify([b"x"], ["a", "b"])


def test_at_most_in_flight_items_are_read_and_sent(serve, connect):
    """The server answers only when three requests wait; it must never see a fourth."""
    together = threading.Barrier(3)
    read = itertools.count()
    taken = []

    def together_only(inputs):
        together.wait(20)
        return embed_text(inputs)

    server = serve(embed_text=together_only)
    texts = (taken.append(number) or str(number) for number in read)
    client = connect(server, in_flight=3)
    answers = client.embedded_texts(texts)
    first = list(itertools.islice(answers, 1))
    assert first[0].value is not None and taken == [0, 1, 2]
    list(itertools.islice(answers, 1))
    assert taken == [0, 1, 2, 3]
    together.abort()
    answers.close()
    assert server.most_at_once == 3


def test_repeated_labels_are_refused_before_anything_is_sent(serve, connect):
    server = serve()
    with pytest.raises(DataError):
        connect(server).classify([b"x"], ["a", "a"])
    assert not server.requests


def test_a_closed_client_may_be_closed_again_and_leaves_no_thread(serve):
    server = serve()
    with Client(server.url) as client:
        answers = client.classified((b"x" for _ in itertools.count()), ["a", "b"])
        next(answers)
    client.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "clipress client"]


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://host", ("http", "host:8000", False)),
        ("http://host:80/triton/", ("http", "host:80/triton", False)),
        ("https://host:443", ("http", "host:443", True)),
        ("grpc://host", ("grpc", "host:8001", False)),
        ("grpcs://[::1]:9", ("grpc", "[::1]:9", True)),
        ("localhost:8001", ("grpc", "localhost:8001", False)),
        ("localhost:8000", ("http", "localhost:8000", False)),
        ("localhost", ("http", "localhost:8000", False)),
    ],
)
def test_the_address_sets_the_protocol(url, found):
    assert address_from(url) == found


@pytest.mark.parametrize(
    ("url", "protocol"), [("ftp://host", "auto"), ("", "auto"), ("http://host:x", "auto"), ("http://host", "grpc")]
)
def test_an_invalid_address_is_refused(url, protocol):
    with pytest.raises(ServerError):
        address_from(url, protocol)


def predict(server, *arguments, labels="a,abc", text=None):
    from clipress.cli import main

    options = ["--labels", labels] if labels else []
    return CliRunner().invoke(main, ["predict", "--url", server.url, *options, *map(str, arguments)], input=text)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.png").write_bytes(b"x" * (number + 1))
    return tmp_path / "images"


def test_predict_takes_images_folders_and_paths_from_standard_input(serve, folder):
    found = predict(serve(), folder / "2.png", folder, "-", text=f"{folder / '0.png'}\n\n{folder / '1.png'}\n")
    assert found.exit_code == 0, found.output
    shown = [line.split(":")[0].rpartition("/")[2] for line in found.stdout.splitlines()]
    assert shown == ["2.png", "0.png", "1.png", "2.png", "0.png", "1.png"]
    assert "image" in found.stderr


def test_predict_writes_a_line_of_json_per_image(serve, folder):
    (folder / "1.png").write_bytes(BAD)
    found = predict(serve(), "--json", folder)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(folder / f"{number}.png") for number in range(3)]
    assert lines[0]["probabilities"] == pytest.approx({"a": 0.25, "abc": 0.75}) and "bad image" in lines[1]["error"]
    assert found.exit_code == 2 and "1 of 3 images could not be classified" in found.stderr


def own_labels(inputs):
    """Classify as a served classifier does, which has no other input than the image."""
    if list(inputs) != ["image"]:
        raise Refusal(400, f"unexpected inference input among {sorted(inputs)} for model 'classify'")
    return {"probabilities": np.asarray([[0.5, 0.3, 0.2]] * len(inputs["image"]))}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("", {"cat": 0.5, "dog": 0.3, "owl": 0.2}), ("owl,dog", {"owl": 0.4, "dog": 0.6}), ("cat", {"cat": 1})],
)
def test_predict_selects_among_the_labels_of_a_served_classifier(serve, folder, labels, expected):
    server = serve(classify=own_labels)
    server.configs["classify"] = {"parameters": {"labels": {"string_value": '["cat", "dog", "owl"]'}}}
    found = predict(server, "--json", folder, labels=labels)
    assert found.exit_code == 0, found.output
    rows = [json.loads(line)["probabilities"] for line in found.stdout.splitlines()]
    assert [list(row) for row in rows] == [list(expected)] * 3 and rows[0] == pytest.approx(expected)


def test_predict_refuses_a_label_that_a_served_classifier_lacks(serve, folder):
    server = serve(classify=own_labels)
    server.configs["classify"] = {"parameters": {"labels": {"string_value": '["cat", "dog"]'}}}
    found = predict(server, folder, labels="cat,dgo")
    assert found.exit_code == 2 and "own 2 labels, found 'dgo'" in found.stderr and "dog" in found.stderr
    assert not server.requests


def test_a_server_whose_model_has_no_parameters_takes_any_labels(serve, connect):
    server = serve()
    assert connect(server).labels() is None
    server.configs["classify"] = {"parameters": {"version": {"string_value": "3"}}}
    assert connect(server).labels() is None


def test_the_client_does_not_load_local_inference():
    code = "import sys, clipress.serve.client; print('clipress.serve.classify' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_predict_without_images_says_what_is_missing(tmp_path):
    found = clipress("predict", tmp_path, "--labels", "a,b")
    assert found.exit_code == 2 and "IMAGES" in found.output


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_real_triton_answers_as_local_inference_does(served, exports, connect, protocol):
    local = LoadedModel(exports[1], threads=1)
    assert connect(f"{protocol}://{getattr(served, protocol)}").labels() is None
    images, labels, templates = (
        [small_image(number)[1] for number in range(20)],
        ["cat", "dog", "größe"],
        ["a {}", "{}!"],
    )
    client = connect(f"{protocol}://{getattr(served, protocol)}", timeout=60)
    for found, wanted in (
        (client.embed_images(images), local.encode_image(images)),
        (client.embed_texts(labels), local.encode_text(labels)),
        (client.classify(images, labels, templates), local.classify(images, labels, templates)),
    ):
        np.testing.assert_allclose(found.values, wanted, atol=1e-4)
        assert not found.errors


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_real_triton_says_which_image_is_bad(served, connect, protocol):
    images = [small_image(0)[1], BAD, small_image(1)[1]]
    client = connect(f"{protocol}://{getattr(served, protocol)}", timeout=60)
    for found in (client.embed_images(images), client.classify(images, ["cat", "dog"])):
        assert found.errors.keys() == {1} and np.isfinite(found.values[[0, 2]]).all()
