"""The `data` commands: prompts, download and filter."""

import functools
import http.server
import io
import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import clipress
from PIL import Image

from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.tasks.clip import encoders


def assert_reports(result, *words):
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.output, result.exception)
    for word in words:
        assert word in result.output, result.output


# prompts


def test_prompts_are_written_as_lines_or_by_class(tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("n01440764 tench\nn01443537 goldfish\n")
    templates = ("--template", "a {c}.", "--template", "my {}")
    result = clipress("data", "prompts", classes, *templates, "--out", tmp_path / "p.txt")
    assert result.exit_code == 0 and "4 prompts of 2 classes" in result.output
    assert (tmp_path / "p.txt").read_text() == "a tench.\nmy tench\na goldfish.\nmy goldfish\n"
    clipress("data", "prompts", classes, *templates, "--out", tmp_path / "p.json")
    wanted = {"tench": ["a tench.", "my tench"], "goldfish": ["a goldfish.", "my goldfish"]}
    assert json.loads((tmp_path / "p.json").read_text()) == wanted


def test_imagenet_with_openais_templates_is_eighty_thousand_prompts(tmp_path):
    clipress("data", "prompts", "imagenet", "--template", "openai", "--out", tmp_path / "p.txt")
    lines = (tmp_path / "p.txt").read_text().splitlines()
    assert len(lines) == 80_000 and lines[0] == "a bad photo of a tench."


def test_a_missing_class_list_and_a_wrong_template_are_reported(tmp_path):
    assert_reports(clipress("data", "prompts", tmp_path / "gone.txt", "--out", tmp_path / "p.txt"), "gone.txt")
    assert_reports(
        clipress("data", "prompts", "imagenet", "--template", "a cat", "--out", tmp_path / "p"), "'a cat'", "{label}"
    )
    assert not (tmp_path / "p.txt").exists()


# download


@pytest.fixture
def fake_img2dataset(monkeypatch):
    calls = []
    module = types.ModuleType("img2dataset")
    module.download = lambda **settings: calls.append(settings)
    monkeypatch.setitem(sys.modules, "img2dataset", module)
    return calls


def test_raw_conceptual_captions_are_converted_to_json_lines(tmp_path, fake_img2dataset):
    table = tmp_path / "cc12m.tsv"
    table.write_text('http://x.org/1.jpg\t"a" dog\nhttp://x.org/2.jpg\tNA\n')
    settings = ("--size", 128, "--per-shard", 50, "--processes", 2, "--threads", 8, "--timeout", 3)
    result = clipress("data", "download", table, "--out", tmp_path / "shards", *settings)
    assert result.exit_code == 0, result.output
    (call,) = fake_img2dataset
    rows = [json.loads(line) for line in Path(call["url_list"]).read_text().splitlines()]
    urls = ["http://x.org/1.jpg", "http://x.org/2.jpg"]
    assert rows == [{"caption": c, "url": u} for c, u in zip(['"a" dog', "NA"], urls, strict=True)]
    wanted = {
        "input_format": "jsonl",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(tmp_path / "shards"),
        "output_format": "webdataset",
        "image_size": 128,
        "resize_mode": "keep_ratio",
        "number_sample_per_shard": 50,
        "processes_count": 2,
        "thread_count": 8,
        "timeout": 3,
        "incremental_mode": "incremental",
    }
    assert {key: call[key] for key in wanted} == wanted


def test_tables_with_named_columns_are_passed_on_unchanged(tmp_path, fake_img2dataset):
    table = tmp_path / "laion.parquet"
    table.write_bytes(b"")
    clipress("data", "download", table, "--out", tmp_path / "s", "--url-key", "URL", "--caption-key", "TEXT")
    (call,) = fake_img2dataset
    assert (call["url_list"], call["input_format"]) == (str(table), "parquet")
    assert (call["url_col"], call["caption_col"]) == ("URL", "TEXT")


def test_a_missing_img2dataset_is_reported_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "img2dataset", None)
    assert_reports(
        clipress("data", "download", tmp_path / "a.tsv", "--out", tmp_path / "s"), "pip install 'clipress[download]'"
    )
    assert not (tmp_path / "s").exists()


def test_tables_that_cannot_be_used_are_reported(tmp_path, fake_img2dataset):
    assert_reports(clipress("data", "download", tmp_path / "a.tsv", "--out", tmp_path / "s"), "a.tsv", "no such file")
    (tmp_path / "b.tsv").write_text("just captions\n")
    assert_reports(clipress("data", "download", tmp_path / "b.tsv", "--out", tmp_path / "s"), "a caption and a URL")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_downloaded_shards_can_be_read(tmp_path):
    pytest.importorskip("img2dataset")
    (tmp_path / "www").mkdir()
    for index in range(6):
        Image.new("RGB", (60, 40), (index * 40, 0, 0)).save(tmp_path / "www" / f"{index}.png")
    handler = functools.partial(Quiet, directory=tmp_path / "www")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    rows = [f'"caption" {index}\t{address}/{index}.png\n' for index in (0, 1, 2, 3, 4, 5, 99)]
    (tmp_path / "cc.tsv").write_text("".join(rows))
    command = [
        "data",
        "download",
        tmp_path / "cc.tsv",
        "--out",
        tmp_path / "shards",
        "--size",
        "20",
        "--per-shard",
        "4",
    ]
    code = "from clipress.cli import main\nif __name__ == '__main__': main()"
    (tmp_path / "start.py").write_text(code)  # img2dataset starts its own processes.
    try:
        subprocess.run([sys.executable, tmp_path / "start.py", *command, "--threads", "2"], check=True, timeout=300)
    finally:
        server.shutdown()
    source = open_source(SourceSpec(format="webdataset", shards=str(tmp_path / "shards")))
    found = {source.captions(i)[0]: source.image(i) for i in range(len(source))}
    assert set(found) == {f'"caption" {index}' for index in range(6)}
    for index in range(6):
        image = found[f'"caption" {index}']
        assert image.size == (30, 20) and abs(image.getpixel((9, 9))[0] - index * 40) <= 4


# filter


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from clipress.artifact import save_artifact
    from clipress.models.load import artifact_from_model, new_model
    from clipress.models.tiny import tiny_architecture

    return save_artifact(
        artifact_from_model(new_model(tiny_architecture(), 0), (), {}), tmp_path_factory.mktemp("t") / "a"
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    buffer = io.BytesIO((tmp_path / "images" / "3.png").read_bytes())
    (tmp_path / "images" / "copy.png").write_bytes(buffer.getvalue())
    (tmp_path / "prompts.txt").write_text("a red circle\na cat\n")
    return tmp_path


def test_filter_keeps_the_images_that_the_teacher_ranks_first(teacher, folder):
    arguments = ("data", "filter", folder / "images", "--prompts", folder / "prompts.txt", "--model", teacher)
    result = clipress(*arguments, "--count", 9, "--out", folder / "all.tsv")
    assert result.exit_code == 0, result.output
    everything = [line.split("\t") for line in (folder / "all.tsv").read_text().splitlines()[1:]]
    assert len(everything) == 9
    scores = [float(score) for _, score, _ in everything]
    assert scores == sorted(scores, reverse=True) and {prompt for *_, prompt in everything} <= {"a red circle", "a cat"}

    from clipress.data.transforms import fitted, normalised, open_image
    from clipress.tasks import model_from_artifact

    model = model_from_artifact(teacher)
    encode_image, encode_text = encoders(model, "Test")
    wanted = encode_text(model.tokenize()(["a red circle", "a cat"]))
    for name, score, _ in everything:
        pixels = normalised(fitted(open_image(folder / "images" / name), model.preprocess)[None], model.preprocess)
        assert float(score) == pytest.approx(float((encode_image(pixels) @ wanted.T).max()), abs=2e-5)

    clipress(*arguments, "--keep", 0.34, "--out", folder / "third.tsv")
    third = [line.split("\t")[0] for line in (folder / "third.tsv").read_text().splitlines()[1:]]
    assert third == [name for name, *_ in everything][:3]
    clipress(*arguments, "--keep", 1, "--near-duplicates", 0.99999, "--out", folder / "alone.tsv")
    alone = {line.split("\t")[0] for line in (folder / "alone.tsv").read_text().splitlines()[1:]}
    assert len({"3.png", "copy.png"} & alone) == 1


def test_filter_needs_a_clip(folder):
    from clipress.artifact import save_artifact
    from clipress.models.load import artifact_from_model
    from clipress.tasks import task_named

    student = {"width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 16, "labels": ["cat", "dog"]}
    model = task_named("classification").student_from(student, None, 0)
    teacher = save_artifact(artifact_from_model(model, (), {}), folder / "classifier")
    result = clipress(
        *("data", "filter", folder / "images", "--prompts", folder / "prompts.txt", "--model", teacher),
        *("--count", 2, "--out", folder / "kept.tsv"),
    )
    assert_reports(result, "classifier: expected a CLIP, found a classification model")
    assert not (folder / "kept.tsv").exists()


def test_filter_requires_either_keep_or_count(teacher, folder):
    arguments = ("data", "filter", folder / "images", "--prompts", folder / "prompts.txt", "--model", teacher)
    assert_reports(clipress(*arguments, "--out", folder / "a.tsv"), "exactly one of --keep and --count")
    assert_reports(
        clipress(*arguments, "--keep", 0.5, "--count", 3, "--out", folder / "a.tsv"),
        "exactly one of --keep and --count",
    )
    assert_reports(
        clipress(*arguments[:3], *arguments[3:5], "--model", folder, "--count", 1, "--out", folder / "a"),
        "clipress.json",
    )
