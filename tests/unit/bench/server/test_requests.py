"""Requests of a load: what each model is sent, as tritonclient reads it, and that a real server answers as local inference."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from blip_exports import set_of
from helpers import clipress
from kserve import Server
from PIL import Image
from triton_requests import SETTINGS
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from clipress.bench.server.load import run
from clipress.bench.server.protocols import InputTemplate, RequestTemplate, checked_sender, open_wire
from clipress.bench.server.requests import model_names, request_templates
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import RecipeError
from clipress.runtime.export_folder import read_export
from clipress.runtime.graph import Input, Output
from clipress.serve.classify import LoadedModel
from clipress.serve.triton_repo import triton_repo_from_export
from clipress.serve.triton_server import TritonServer
from clipress.workflow.bench_server import LoadRequest, Windows, bench_run_server

BLIPS = {
    "caption": ("caption", ["image"], "caption"),
    "vqa": ("answer", ["image", "question"], "answer"),
    "nlvr": ("judge", ["image", "other_image", "statement"], "probability"),
    "retrieval": ("match", ["image", "text"], "probability"),
}
"""By task: the model, what is sent, and what it gives."""
IMAGES = ("image", "other_image")
TWO = RequestTemplate(
    "two",
    {
        "text": InputTemplate("BYTES", (1,), lambda number: serialized(b"x" * number)),
        "numbers": InputTemplate("INT32", (1, 2), lambda number: np.int32([number, 7]).tobytes()),
    },
    "scores",
)


def serialized(content):
    return serialize_byte_tensor(np.asarray([content], object)).item()


def strings_of(content):
    return list(deserialize_bytes_tensor(content))


class Recorder(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Keeps the requests it gets."""

    def __init__(self):
        self.requests = []

    def ModelInfer(self, request, context):
        inputs = {}
        for one, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            values = deserialize_bytes_tensor(raw) if one.datatype == "BYTES" else np.frombuffer(raw, np.int32)
            inputs[one.name] = values.reshape(one.shape)
        self.requests.append((request.model_name, inputs))
        return service_pb2.ModelInferResponse()


@pytest.fixture(params=["http", "grpc"])
def recorded(request):
    """A server that keeps its requests: protocol, address, requests."""
    if request.param == "http":
        server = Server(two=lambda inputs: {"scores": np.zeros(1)})
        yield "http", server.url.removeprefix("http://"), server.requests
        server.close()
    else:
        recorder, server = Recorder(), grpc.server(ThreadPoolExecutor(1))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(recorder, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield "grpc", f"127.0.0.1:{port}", recorder.requests
        server.stop(None).wait()


def sent(protocol, address, template, numbers):
    """Send some requests of a template, and return their answers."""

    async def work():
        wire = open_wire(protocol, address, False)
        try:
            send = await checked_sender(wire, template, address)
            return [await send(number) for number in numbers]
        finally:
            await wire.close()

    return run(work(), False)


def test_several_inputs_of_different_types_and_sizes_arrive_under_their_names(recorded):
    protocol, address, requests = recorded
    sent(protocol, address, TWO, [3, 300])
    assert [(name, list(inputs)) for name, inputs in requests] == [("two", ["text", "numbers"])] * 3
    for (_, inputs), number in zip(requests, [0, 3, 300], strict=True):
        assert inputs["text"].tolist() == [b"x" * number]
        assert inputs["numbers"].tolist() == [[number, 7]]


def test_each_graph_of_images_or_texts_has_its_own_requests(tiny_run):
    exported, sets = read_export(tiny_run[0] / "export" / "int8"), evalsets([SourceSpec(format="digits", limit=3)])
    found = request_templates(exported, sets)
    assert list(found) == model_names(exported.graphs) == ["embed_image", "image_encoder", "embed_text"]
    (file,), (text,), (pixels,) = (
        found[model].inputs.values() for model in ("embed_image", "embed_text", "image_encoder")
    )
    assert strings_of(file.content(0))[0][:2] == b"\xff\xd8"  # This is a JPEG.
    assert text.content(1) != text.content(2)
    array = np.frombuffer(pixels.content(0), "f").reshape(pixels.shape)
    assert array.shape == (1, 3, 32, 32) and pixels.content(3) == array.tobytes()  # Three images alternate.
    outputs = (Output(name="logits", shape=(10,)),)
    scores = exported.graphs["image"].model_copy(update={"name": "photo", "outputs": outputs, "agrees": "logits"})
    (files, rows) = request_templates(exported.model_copy(update={"graphs": {"photo": scores}}), sets).values()
    assert (files.model, list(files.inputs), files.output) == ("score_photo", ["image"], "logits")
    assert (rows.model, list(rows.inputs), rows.output) == ("photo_classifier", ["pixel_values"], "logits")
    several = scores.model_copy(update={"inputs": (*scores.inputs, Input(name="ids", dtype="int64", shape=(5,)))})
    assert model_names({"photo": several}) == []


@pytest.mark.parametrize("task", BLIPS)
def test_a_request_to_a_blip_holds_the_images_and_the_text_of_one_record(blip_exports, task):
    (model, names, gives), source = BLIPS[task], set_of(task).source
    exported = read_export(blip_exports[task][0])
    found = request_templates(exported, [set_of(task)])
    assert list(found) == model_names(exported.graphs)
    assert list(found)[:-1] == (["embed_image", "image_encoder", "embed_text"] if task == "retrieval" else [])
    template = found[model]
    assert (list(template.inputs), template.output) == (names, gives)
    for number in (0, 5, len(source) + 5):
        record = number % len(source)
        for name, one in template.inputs.items():
            (content,) = strings_of(one.content(number))
            assert (one.datatype, one.shape) == ("BYTES", (1,))
            if name in IMAGES:
                pixels = np.asarray(Image.open(io.BytesIO(content)), float)
                assert np.abs(pixels - getattr(source, name)(record)).mean() < 10  # JPEG loses a little.
            else:
                assert content.decode() == source.captions(record)[0]


@pytest.mark.parametrize(
    "task, data, lacks", [("retrieval", "shapes", "no captions"), ("nlvr", "scenes", "no pairs of images")]
)
def test_test_data_without_what_a_model_takes_is_refused(blip_exports, task, data, lacks):
    sets = evalsets([SourceSpec(format=data, split="val", limit=2)])
    with pytest.raises(RecipeError, match=f"{data} has {lacks}"):
        request_templates(read_export(blip_exports[task][0]), sets)


def test_a_run_whose_graphs_have_no_requests_is_refused(blip_exports, monkeypatch):
    monkeypatch.setattr("clipress.workflow.bench_server.model_names", lambda graphs: [])
    with pytest.raises(RecipeError, match="Expected graphs that take images or texts"):
        bench_run_server(blip_exports["nlvr"][0].parents[1], LoadRequest(Windows(), stage="dense"), print)


def said(local, template, number):
    """Return what local inference says to a request."""
    given = [strings_of(one.content(number)) for one in template.inputs.values()]
    (found,) = getattr(local, template.model)(*(as_given(*one) for one in zip(template.inputs, given, strict=True)))
    return found


def as_given(name, values):
    return values if name in IMAGES else [text.decode() for text in values]


def gives(answer, expected):
    """Return whether the tensor at the end of an answer is a text, or a probability."""
    if isinstance(expected, str):
        return answer.endswith(serialized(expected.encode()))
    return np.frombuffer(answer[-4:], np.float32) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", BLIPS)
def test_a_blip_is_measured_under_load_and_a_request_is_answered_as_local_inference_does(
    triton, blip_exports, tmp_path, task
):
    export, model = blip_exports[task][0], BLIPS[task][0]
    template = request_templates(read_export(export), [set_of(task)])[model]
    expected = [said(LoadedModel(export, threads=1), template, number) for number in (0, 1)]
    short = ("--window", "300", "--warm-up", "0", "--trials", "3", "--out", tmp_path)
    gate = ("--fail-if", f"errors{{model={model}}} > 0")
    (repository,) = triton_repo_from_export(export, tmp_path / "triton", SETTINGS)
    with TritonServer(repository, triton=triton) as server:
        for protocol, load in (("http", ("--concurrency", "2")), ("grpc", ("--request-rate", "20"))):
            address = getattr(server, protocol)
            answers = sent(protocol, address, template, (0, 1))
            assert all(gives(*one) for one in zip(answers, expected, strict=True))
            words = ("--stage", "dense", "--url", f"{protocol}://{address}", "--model", model, *short, *load, *gate)
            result = clipress("bench-server", export.parents[1], *words)
            assert result.exit_code == 0, result.output
            (row,) = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))["rows"]
            assert row["errors"] == 0 < row["requests"] and row["triton"][model]["requests"] > 0


def test_a_damaged_image_is_not_among_the_requests(tiny_run, tmp_path):
    for number in range(3):
        Image.effect_noise((40, 40), 20 + number).convert("RGB").save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    exported, sets = (
        read_export(tiny_run[0] / "export" / "int8"),
        evalsets([SourceSpec(format="images", images=tmp_path)]),
    )
    content = request_templates(exported, sets)["embed_image"].inputs["image"].content
    assert content(0) == content(2) != content(1)
