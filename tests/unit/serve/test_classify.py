"""Classification from an export folder, against NumPy on graphs small enough to compute by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto
from small_exports import (
    DIM,
    IMAGE_WEIGHT,
    LABELS,
    LENGTH,
    SIZE,
    TEXT_WEIGHT,
    describe,
    ids_of,
    linear_encoder,
    normalised_by_hand,
    small_image,
    write_classifier,
    write_export,
    write_questions,
)

from clipress.errors import ArtifactError, DataError, ExportError
from clipress.runtime.export_folder import read_export
from clipress.serve.classify import BATCH, LoadedModel
from clipress.workflow.predict import labels_from


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "run" / "export" / "int8")


@pytest.fixture
def texts_seen(monkeypatch):
    """Replace the tokenizer by one that can be computed by hand; return the list of texts it gets."""
    seen = []

    def tokenizer_from_spec(spec):
        assert spec == {"name": "clip-bpe", "context_length": LENGTH, "kwargs": {}}
        return lambda texts: seen.extend(texts) or np.asarray([ids_of(text) for text in texts], np.int64)

    monkeypatch.setattr("clipress.runtime.export_folder.tokenizer_from_spec", tokenizer_from_spec)
    return seen


@pytest.fixture
def classifier(export, texts_seen):
    return LoadedModel(export, threads=1)


def by_hand(images, labels, templates, scale=3.0):
    def unit(vector):
        return vector / np.linalg.norm(vector)

    rows = []
    for pixels in images:
        image = unit(normalised_by_hand(pixels) @ IMAGE_WEIGHT)
        logits = []
        for label in labels:
            prompts = [unit(np.asarray(ids_of(template.format(label))) @ TEXT_WEIGHT) for template in templates]
            logits.append(scale * image @ unit(np.mean(prompts, axis=0)))
        weights = np.exp(np.asarray(logits))
        rows.append(weights / weights.sum())
    return np.asarray(rows)


def test_probabilities_equal_those_computed_by_hand(classifier, tmp_path):
    (first, first_file), (second, second_file) = small_image(1), small_image(2)
    (tmp_path / "second.png").write_bytes(second_file)
    labels, templates = ["cat", "dog", "red fox"], ["a photo of a {}", "{}!"]
    found = classifier.classify([first_file, tmp_path / "second.png"], labels, templates)
    np.testing.assert_allclose(found, by_hand([first, second], labels, templates), atol=1e-5)


def test_the_default_template_is_a_photo(classifier, texts_seen):
    classifier.classify([small_image(1)[1]], ["cat", "dog"])
    assert texts_seen == ["a photo of a cat", "a photo of a dog"]


def test_label_embeddings_are_one_unit_vector_per_label(classifier):
    found = classifier.label_embeddings(["cat", "dog"], ["{}", "the {}", "{}s"])
    assert found.shape == (2, DIM)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_more_images_than_a_batch_come_back_in_order(classifier):
    images = [small_image(seed) for seed in range(BATCH + 3)]
    found = classifier.classify([file for _, file in images], ["cat", "dog"])
    expected = by_hand([pixels for pixels, _ in images], ["cat", "dog"], ["a photo of a {}"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_images_give_no_rows(classifier):
    assert classifier.classify([], ["cat", "dog"]).shape == (0, 2)


def test_a_sharp_model_does_not_overflow(export, texts_seen):
    describe(export, logit_scale=1e5)
    found = LoadedModel(export).classify([small_image(1)[1]], ["cat", "dog", "fox"])
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_braces_in_a_label_are_not_placeholders(classifier, texts_seen):
    classifier.label_embeddings(["set {0}", "{}"], ["a {}, {x}"])
    assert texts_seen == ["a set {0}, {x}", "a {}, {x}"]


@pytest.mark.parametrize(
    "labels, templates, message",
    [
        ([], ["{}"], "at least one name"),
        (["cat", " "], ["{}"], "blank"),
        (["cat", "dog", "cat"], ["{}"], "repeated ones: cat"),
        (["cat"], [], "template"),
        (["cat"], ["{}", "a photo"], r"'a photo' has no \{\}"),
    ],
)
def test_malformed_labels_and_templates_are_refused(classifier, labels, templates, message):
    with pytest.raises(DataError, match=message):
        classifier.classify([small_image(1)[1]], labels, templates)


def test_a_file_that_is_not_an_image_is_named(classifier, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt"):
        classifier.classify([small_image(1)[1], tmp_path / "notes.txt"], ["cat", "dog"])


def test_non_finite_embeddings_are_an_error(export, texts_seen):
    linear_encoder(
        export / "image.onnx",
        "pixel_values",
        TensorProto.FLOAT,
        [3, SIZE, SIZE],
        "image_embeds",
        np.full_like(IMAGE_WEIGHT, np.nan),
    )
    describe(export)
    with pytest.raises(ArtifactError, match="1 of 1 image embeddings are not finite"):
        LoadedModel(export).classify([small_image(1)[1]], ["cat"])


def test_the_number_of_threads_reaches_the_runtime(export, texts_seen):
    sessions = LoadedModel(export, threads=3).sessions.values()
    assert [session.get_session_options().intra_op_num_threads for session in sessions] == [3, 3]


def test_a_folder_without_an_export_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtifactError, match=r"no export\.json. Create it with: clipress export RUN"):
        read_export(tmp_path / "nowhere")


@pytest.mark.parametrize("graph", ["image", "text"])
def test_a_missing_onnx_file_says_how_to_make_it_again(export, graph):
    (export / f"{graph}.onnx").unlink()
    with pytest.raises(ArtifactError, match=rf"no {graph}\.onnx. Export it again: clipress export RUN"):
        LoadedModel(export)


@pytest.mark.parametrize("graph", ["image", "text"])
def test_a_changed_onnx_file_is_not_opened(export, graph):
    path = export / f"{graph}.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{graph}\.onnx .* truncated or changed.*clipress export RUN"):
        LoadedModel(export)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b"{}"], ids=lambda content: content[:5]
)
def test_a_damaged_description_is_refused(export, content):
    (export / "export.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"export\.json.*clipress export RUN"):
        read_export(export)


@pytest.mark.parametrize(
    "change, place",
    [
        ({"schema_version": 2}, "schema_version"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"embed_dim": "wide"}, "embed_dim"),
        ({"preprocess": {"size": 2, "colour": "grey"}}, "preprocess.colour"),
        ({"tokenizer": {"name": "clip-bpe"}}, "tokenizer.context_length"),
        ({"files": {"image": {"file": "image.onnx", "sha256": ""}}}, "files"),
    ],
)
def test_a_description_with_a_wrong_value_names_its_place(export, change, place):
    describe(export, **change)
    with pytest.raises(ArtifactError, match=rf"export\.json, {place}:"):
        read_export(export)


def test_a_file_that_is_not_onnx_is_refused(export, texts_seen):
    (export / "text.onnx").write_bytes(b"not a graph")
    describe(export)
    with pytest.raises(ExportError, match=r"text\.onnx cannot be opened by ONNX Runtime"):
        LoadedModel(export)


@pytest.fixture
def own_labels(tmp_path):
    return LoadedModel(write_classifier(tmp_path / "classifier"), threads=1)


def test_non_finite_logits_of_a_classifier_are_called_logits(tmp_path, own_labels):
    session = SimpleNamespace(run=lambda names, inputs: [np.full((1, len(LABELS)), np.nan, np.float32)])
    own_labels.sessions = dict.fromkeys(own_labels.sessions, session)
    with pytest.raises(ArtifactError, match="1 of 1 image logits are not finite"):
        own_labels.classify([small_image(1)[1]])


def softmax_by_hand(images, columns=slice(None)):
    logits = np.stack([normalised_by_hand(pixels) @ IMAGE_WEIGHT for pixels in images])[:, columns]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_a_classifier_gives_the_probabilities_of_its_own_labels(own_labels):
    images = [small_image(seed) for seed in range(BATCH + 3)]
    assert own_labels.labels == LABELS
    found = own_labels.classify([file for _, file in images])
    np.testing.assert_allclose(found, softmax_by_hand([pixels for pixels, _ in images]), atol=1e-5)


def test_a_classifier_chooses_among_some_of_its_labels(own_labels):
    pixels, file = small_image(1)
    found = own_labels.classify([file], ["red fox", "cat"])
    np.testing.assert_allclose(found, softmax_by_hand([pixels], [2, 0]), atol=1e-5)


@pytest.mark.parametrize(
    "labels, message",
    [
        (["cat", "red fux"], "own 4 labels, found 'red fux'. Did you mean 'red fox'"),
        ([], "at least one"),
        (["cat"] * 2, "cat"),
    ],
)
def test_a_classifier_refuses_labels_that_are_not_its_own(own_labels, labels, message):
    with pytest.raises(DataError, match=message):
        own_labels.classify([small_image(1)[1]], labels)


def test_a_classifier_has_no_embeddings(own_labels):
    with pytest.raises(
        ExportError, match="expected a graph 'text' that gives embeddings, found a model that classifies images"
    ):
        own_labels.label_embeddings(["cat"])


def test_a_clip_needs_labels(classifier):
    with pytest.raises(DataError, match="at least one name"):
        classifier.classify([small_image(1)[1]])


def test_a_task_that_does_not_classify_is_refused(tmp_path):
    with pytest.raises(
        ExportError, match=r"expected the export of a CLIP, a BLIP, or of a classifier or Segmenter.* found a questions"
    ):
        LoadedModel(write_questions(tmp_path / "questions"))


@pytest.mark.parametrize(
    "option, labels",
    [("cat,dog", ["cat", "dog"]), (" red fox , dog ,", ["red fox", "dog"]), ("cat", ["cat"]), ("a,,b", ["a", "b"])],
)
def test_labels_are_split_at_commas_and_trimmed(option, labels):
    assert labels_from(option, None) == labels


@pytest.mark.parametrize(
    "content, labels",
    [
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"cat\r\n\r\n  red, hot fox\r\n", ["cat", "red, hot fox"]),
        (b"\xef\xbb\xbfcat", ["cat"]),
        ("Käfer\nлиса".encode(), ["Käfer", "лиса"]),
    ],
)
def test_a_labels_file_has_one_label_per_line(tmp_path, content, labels):
    (tmp_path / "labels.txt").write_bytes(content)
    assert labels_from(None, tmp_path / "labels.txt") == labels


@pytest.mark.parametrize("option", ["", " ", ",", " , ,"])
def test_an_option_without_labels_is_refused(option):
    with pytest.raises(DataError, match="holds no label"):
        labels_from(option, None)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_labels_is_refused(tmp_path, content):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.txt holds no label"):
        labels_from(None, tmp_path / "labels.txt")


def test_a_repeated_label_is_named():
    with pytest.raises(DataError, match="repeated ones: cat, dog"):
        labels_from("cat,dog, cat,fox,dog", None)


def test_a_labels_file_that_is_missing_undecodable_or_a_folder_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        labels_from(None, tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"latin\.txt cannot be read.*UTF-8"):
        labels_from(None, tmp_path / "latin.txt")
    with pytest.raises(DataError, match="cannot be read"):
        labels_from(None, tmp_path)


def test_labels_come_from_the_option_or_the_file(tmp_path):
    (tmp_path / "labels.txt").write_text("cat")
    with pytest.raises(DataError, match="found none"):
        labels_from(None, None)
    with pytest.raises(DataError, match="found both"):
        labels_from("cat", tmp_path / "labels.txt")
