"""`clipress predict` with BLIPs: what it prints is what the loaded model says, and mistakes are one message."""

import json

import pytest
from blip_exports import DATA, images_of, set_of, texts_of
from helpers import clipress
from kserve import Server
from PIL import Image

from clipress.serve.classify import LoadedModel
from clipress.workflow.outcome import Run

QUESTION, STATEMENT, TEXT = ("--question", "red?"), ("--statement", "a red circle"), ("--text", "a red circle")


@pytest.fixture(scope="module")
def runs(blip_exports):
    return {task: export.parents[1] for task, (export, _) in blip_exports.items()}


@pytest.fixture(scope="module")
def loaded(blip_exports):
    return {task: LoadedModel(export, threads=1) for task, (export, _) in blip_exports.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the first images of every task as files."""
    folder, found = tmp_path_factory.mktemp("images"), {}
    for task in DATA:
        found[task] = [folder / f"{task}-{place}.png" for place in range(4)]
        for path, image in zip(found[task], images_of(task), strict=False):
            Image.fromarray(image).save(path)
    return found


def printed(*arguments):
    result = clipress("predict", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output.splitlines()


def records(*arguments):
    return [json.loads(line) for line in printed(*arguments, "--json")]


def test_captions_are_printed_one_per_image(runs, loaded, files):
    run, images = runs["caption"], files["caption"]
    captions = loaded["caption"].caption(images)
    assert printed(run, *images) == [f"{image}: {text}" for image, text in zip(images, captions, strict=True)]
    found = records(run, *images)
    assert found == [{"image": str(image), "caption": text} for image, text in zip(images, captions, strict=True)]
    assert printed(run, images[0].parent / "caption-0.png", "--stage", "dense") == [f"{images[0]}: {captions[0]}"]


def test_questions_are_answered_from_labels_or_freely(runs, loaded, files):
    run, images, question = runs["vqa"], files["vqa"], texts_of("vqa")[0]
    labels = set_of("vqa").source.candidates
    chosen, written = (loaded["vqa"].answer(images, question, answers) for answers in (labels, None))
    assert len(set(chosen)) > 1
    command = run, *images, "--question", question
    assert printed(*command, "--labels", ",".join(labels)) == [
        f"{image}: {answer}" for image, answer in zip(images, chosen, strict=True)
    ]
    assert [one["answer"] for one in records(*command)] == written and records(*command)[0]["question"] == question


def test_a_statement_is_judged_by_two_images(runs, loaded, files):
    run, images = runs["nlvr"], files["nlvr"][:2]
    (probability,) = loaded["nlvr"].judge(*images, STATEMENT[1])
    assert printed(run, *images, *STATEMENT) == [f"{images[0]}, {images[1]}: {probability:.1%} likely to be true"]
    (found,) = records(run, *images, *STATEMENT)
    assert found["images"] == [*map(str, images)] and found["probability"] == pytest.approx(probability, abs=1e-6)
    (exchanged,) = records(run, *images[::-1], *STATEMENT)
    assert exchanged["probability"] != found["probability"]


def test_images_are_ranked_by_texts(runs, loaded, files):
    run, images, texts = runs["retrieval"], files["retrieval"], texts_of("retrieval")[:2]
    scores = loaded["retrieval"].rank(images, texts)
    asked = [word for text in texts for word in ("--text", text)]
    found = records(run, *images, *asked)
    assert [one["text"] for one in found] == texts
    for one, row in zip(found, scores, strict=True):
        assert [rank["image"] for rank in one["images"]] == [str(images[place]) for place in (-row).argsort()]
        assert [rank["score"] for rank in one["images"]] == pytest.approx(sorted(row, reverse=True), abs=1e-6)
    best = "  ".join(f"{one['image']} {one['score']:.2f}" for one in found[0]["images"])
    assert printed(run, *images, *asked)[0] == f"{texts[0]}: {best}"


def test_a_blip_for_retrieval_classifies_among_labels(runs, loaded, files):
    (found,) = records(runs["retrieval"], files["retrieval"][0], "--labels", "red,blue")
    expected = loaded["retrieval"].classify(files["retrieval"][0], ["red", "blue"])
    assert [*found["probabilities"].values()] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("caption", QUESTION, "--question: expected a model that answers questions about images, but this one writes captions"),
        ("caption", STATEMENT, "--statement: expected a model that judges"),
        ("caption", TEXT, "--text: expected a model that finds"),
        ("caption", ("--labels", "a,b"), "cannot be used with a model that writes captions"),
        ("vqa", (), "answers questions about images: set --question."),
        ("vqa", (*QUESTION, *STATEMENT), "--statement: expected a model that judges"),
        ("nlvr", (), "judges statements about two images: set --statement."),
        ("nlvr", (*STATEMENT, "--labels", "a,b"), "cannot be used with a model that judges"),
        ("nlvr", STATEMENT, "expected two images, which the statement is about, found 1"),
        ("retrieval", (), "set --text, or --labels to classify images"),
        ("retrieval", (*TEXT, "--labels", "a,b"), "cannot be used with --text"),
        ("retrieval", QUESTION, "but this one finds images for texts"),
    ],
)  # fmt: skip
def test_an_option_that_does_not_fit_the_model_is_one_message(runs, files, task, options, message):
    result = clipress("predict", runs[task], files[task][0], *options)
    assert result.exit_code == 2 and " ".join(result.output.split()).startswith("Error: "), result.output
    assert message in " ".join(result.output.split()), result.output


def test_a_clip_is_not_asked_and_its_server_neither(tiny_run, files):
    result = clipress("predict", tiny_run[0], files["vqa"][0], *QUESTION, "--labels", "a,b")
    assert result.exit_code == 2 and "but this one embeds images and texts" in result.output
    server = Server(classify=lambda inputs: {})
    for options, message in (
        (QUESTION, "--question: expected a model that answers"),
        (TEXT, "--text: expected a model"),
    ):
        result = clipress("predict", "--url", server.url, files["vqa"][0], *options)
        assert result.exit_code == 2 and message in result.output and "but this one is no BLIP" in result.output
    server.close()


def test_a_server_that_does_not_answer_is_one_message(files):
    result = clipress("predict", "--url", "http://127.0.0.1:9", files["vqa"][0], *QUESTION)
    assert result.exit_code == 2 and result.output.startswith("Error: http://127.0.0.1:9")


def test_the_command_to_try_fits_the_model(runs):
    ends = {"caption": "IMAGE", "vqa": "IMAGE --question TEXT", "nlvr": "IMAGE IMAGE --statement TEXT"}
    for task, end in (ends | {"retrieval": "IMAGE --text TEXT"}).items():
        assert Run(runs[task], ("dense",), served="dense").predict_command == f"clipress predict {runs[task]} {end}"
