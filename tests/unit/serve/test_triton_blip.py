"""BLIPs on a server: what a repository has, and that a real Triton says what a loaded export says."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from blip_exports import images_of, set_of, texts_of
from google.protobuf import text_format
from helpers import clipress
from triton_requests import SETTINGS, column, tensor
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from clipress.data.transforms import as_image
from clipress.errors import ExportError
from clipress.serve.blip_client import BlipClient
from clipress.serve.classify import LoadedModel
from clipress.serve.client import Client
from clipress.serve.indexing import index_images
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_repo import triton_repo_from_export
from clipress.serve.triton_server import TritonServer

WHOLE = {"caption": "caption", "vqa": "answer", "nlvr": "judge"}


def files_of(task, folder, count=4):
    """Return images of a task as files, and as their contents."""
    paths = [folder / f"{place}.png" for place in range(count)]
    for path, image in zip(paths, images_of(task), strict=False):
        as_image(image).save(path)
    return paths, [path.read_bytes() for path in paths]


def strings(name, values):
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    return tensor(triton_grpc, name, np.asarray(encoded, object))


def told(answer, name):
    return [text.decode() for text in answer.as_numpy(name)]


@pytest.mark.parametrize("task", WHOLE)
@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_a_blip_that_writes_or_judges_is_one_model_with_its_whole_export(blip_exports, tmp_path, task, backend):
    export, model = blip_exports[task][0], WHOLE[task]
    settings = ServeSettings(backend=backend, instances=2, threads=3)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    assert {path.name for path in repository.iterdir()} == {"README.md", model}
    names = {path.name for path in (repository / model / "1").iterdir()}
    assert names == {path.name for path in export.iterdir()} | {"model.py", "release.json"}
    config = text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert sum(group.count for group in config.instance_group) == 2
    assert [one.name for one in config.input if one.optional] == ["answers"] * (task == "vqa")
    page = (repository / "README.md").read_text()
    assert f"| `{model}` |" in page and "_encoder" not in page and f"python {model}.py" in page
    assert triton_repo_from_export(export, tmp_path, settings) == [repository]
    assert not (repository / model / "2").exists()


def test_a_blip_for_retrieval_has_the_models_of_a_clip_and_one_that_matches(blip_exports, tmp_path):
    (repository,) = triton_repo_from_export(blip_exports["retrieval"][0], tmp_path, ServeSettings(backend="python"))
    encoders = {"image_encoder", "text_encoder", "preprocess", "tokenize", "embed_image", "embed_text", "classify"}
    found = {path.name for path in repository.iterdir() if path.is_dir()}
    assert found == encoders | {"match_classifier", "score_match", "match"}
    assert "| `match` | `image` BYTES [N], `text` BYTES [N] |" in (repository / "README.md").read_text()


def test_engines_of_it_are_refused(blip_exports, tmp_path):
    with pytest.raises(ExportError, match="a model that writes captions of images is served by ONNX Runtime"):
        triton_repo_from_export(blip_exports["caption"][0], tmp_path, ServeSettings(backend="tensorrt"))


def printed_by_the_readme(server, folder, *arguments):
    """Run the README's program with arguments, and return its lines."""
    page = (server.repository / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("localhost:8001", server.grpc)
    (folder / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, folder / "program.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def predicted(*arguments):
    """Return what `clipress predict` prints, as records."""
    result = clipress("predict", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refusal(*arguments):
    """Return the message of `clipress predict` with a mistake."""
    result = clipress("predict", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return " ".join(result.output.split())


def urls_of(server):
    return f"http://{server.http}", f"grpc://{server.grpc}"


def serving(triton, export, folder, **more):
    (repository,) = triton_repo_from_export(export, folder / "triton", SETTINGS.model_copy(update=more))
    return TritonServer(repository, triton=triton)


def test_a_server_writes_the_captions_of_local_inference(triton, blip_exports, tmp_path):
    export = blip_exports["caption"][0]
    paths, contents = files_of("caption", tmp_path, 6)
    expected = LoadedModel(export, threads=1).caption(paths)
    with serving(triton, export, tmp_path) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        assert told(client.infer("caption", [strings("image", contents)]), "caption") == expected
        with triton_http.InferenceServerClient(server.http) as http:
            given = tensor(triton_http, "image", np.asarray(contents, object))
            assert told(http.infer("caption", [given]), "caption") == expected
        with pytest.raises(InferenceServerException, match="not a readable image"):
            client.infer("caption", [strings("image", [contents[0], b"no image"])])
        assert told(client.infer("caption", [strings("image", contents[:1])]), "caption") == expected[:1]
        assert printed_by_the_readme(server, tmp_path, *paths) == expected
        (tmp_path / "no.png").write_bytes(b"no image")
        for url in urls_of(server):
            assert predicted("--url", url, *paths) == predicted(export.parents[1], *paths)
            found = clipress("predict", "--url", url, tmp_path / "no.png", tmp_path / "none.png", paths[0])
            assert found.exit_code == 2 and found.stdout == f"{paths[0]}: {expected[0]}\n"
            assert "2 of 3 images failed" in found.output and "not a readable image" in found.output
            assert "but this one writes captions of images" in refusal("--url", url, paths[0], "--question", "red?")


def test_a_server_gives_the_answers_of_local_inference(triton, blip_exports, tmp_path):
    export, local = blip_exports["vqa"][0], LoadedModel(blip_exports["vqa"][0], threads=1)
    paths, contents = files_of("vqa", tmp_path)
    questions, candidates = texts_of("vqa")[:4], set_of("vqa").source.candidates
    asked = [strings("image", contents), strings("question", questions)]
    with serving(triton, export, tmp_path) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        assert told(client.infer("answer", asked), "answer") == local.answer(paths, questions)
        chosen = client.infer("answer", [*asked, strings("answers", candidates)])
        assert told(chosen, "answer") == local.answer(paths, questions, candidates)
        with pytest.raises(InferenceServerException, match="found 3 images, 4 questions"):
            client.infer("answer", [strings("image", contents[:3]), asked[1]])
        for answers in ((), candidates):
            (line,) = printed_by_the_readme(server, tmp_path, paths[0], questions[0], *answers)
            assert [line] == local.answer(paths[0], questions[0], answers or None)
            asked = [*paths, "--question", questions[0], *(["--labels", ",".join(answers)] if answers else [])]
            for url in urls_of(server):
                assert predicted("--url", url, *asked) == predicted(export.parents[1], *asked)
        assert "set --question" in refusal("--url", url, paths[0])


def test_a_server_judges_as_local_inference_does(triton, blip_exports, tmp_path):
    export, local = blip_exports["nlvr"][0], LoadedModel(blip_exports["nlvr"][0], threads=1)
    paths, contents = files_of("nlvr", tmp_path)
    statements = texts_of("nlvr")[:4]
    expected = local.judge(paths, paths[::-1], statements)
    images = [strings("image", contents), strings("other_image", contents[::-1])]
    with serving(triton, export, tmp_path) as server, triton_grpc.InferenceServerClient(server.grpc) as client:
        found = client.infer("judge", [*images, strings("statement", statements)]).as_numpy("probability")
        np.testing.assert_allclose(found, expected, atol=1e-6)
        printed = printed_by_the_readme(server, tmp_path, paths[0], paths[-1], statements[0])
        assert printed == [f"{expected[0]:.1%} likely to be true"]
        for url in urls_of(server):
            (record,) = predicted("--url", url, paths[0], paths[-1], "--statement", statements[0])
            assert record["images"] == [str(paths[0]), str(paths[-1])]
            assert record["probability"] == pytest.approx(expected[0], abs=1e-5)
        assert "expected two images" in refusal("--url", url, *paths[:3], "--statement", "red")
        assert "none.png cannot be read" in refusal("--url", url, paths[0], tmp_path / "none.png", "--statement", "red")


def test_a_server_embeds_searches_and_matches_as_local_inference_does(triton, blip_exports, tmp_path):
    export, local = blip_exports["retrieval"][0], LoadedModel(blip_exports["retrieval"][0], threads=1)
    paths, contents = files_of("retrieval", tmp_path, 10)
    texts = texts_of("retrieval")[:10]
    index_images(str(tmp_path), export, tmp_path / "index", threads=1)
    with (
        serving(triton, export, tmp_path, index=tmp_path / "index") as server,
        triton_grpc.InferenceServerClient(server.grpc) as client,
    ):
        images = client.infer("embed_image", [tensor(triton_grpc, "image", column(contents[:8]))])
        np.testing.assert_allclose(images.as_numpy("image_embeds"), local.encode_image(paths[:8]), atol=1e-5)
        found = client.infer("embed_text", [tensor(triton_grpc, "text", column([text.encode() for text in texts[:8]]))])
        np.testing.assert_allclose(found.as_numpy("text_embeds"), local.encode_text(texts[:8]), atol=1e-5)
        matched = client.infer("match", [strings("image", contents), strings("text", texts)]).as_numpy("probability")
        np.testing.assert_allclose(matched, local.match(paths, texts), atol=1e-5)  # more than a batch
        with pytest.raises(InferenceServerException, match="as many images as texts, found 2 and 1"):
            client.infer("match", [strings("image", contents[:2]), strings("text", texts[:1])])
        asked = [word for text in texts[:2] for word in ("--text", text)]
        expected = local.rank(paths, texts[:2])
        for url in urls_of(server):
            for record, text, row in zip(predicted("--url", url, *paths, *asked), texts, expected, strict=False):
                assert record["text"] == text
                assert [one["image"] for one in record["images"]] == [str(paths[place]) for place in np.argsort(-row)]
                assert [one["score"] for one in record["images"]] == pytest.approx(np.sort(row)[::-1], abs=1e-4)
            with BlipClient(url) as own:  # the others are behind them
                np.testing.assert_allclose(own.rank(paths, texts, 3), local.rank(paths, texts, 3), atol=1e-4)
            (record,) = predicted("--url", url, paths[0], "--labels", "red,blue")
            assert [*record["probabilities"].values()] == pytest.approx(
                local.classify(paths[0], ["red", "blue"]), abs=1e-5
            )
        assert "none.png cannot be read" in refusal("--url", url, paths[0], tmp_path / "none.png", "--text", "red")
        with Client(f"grpc://{server.grpc}") as own:
            found, hits = own.classify(contents, ["red", "blue"]).values, own.search(texts[0], 3)
        nearest = np.argsort(-(local.encode_image(paths) @ local.encode_text(texts[0])[0]))[:3]
        assert [hit.key for hit in hits] == [str(paths[place]) for place in nearest]
        np.testing.assert_allclose(found, local.classify(paths, ["red", "blue"]), atol=1e-5)
