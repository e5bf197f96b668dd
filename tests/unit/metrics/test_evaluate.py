"""Evaluation with two encoders: captions, templates, labels, seen and unseen classes."""

import logging

import numpy as np
import pytest
from PIL import Image

from clipress.data.eval_sets import evalsets, probe_sets
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError, DataError, RecipeError
from clipress.metrics.evaluate import encode_texts, evaluate, evaluate_items
from clipress.tasks import task_named

PREPROCESS = Preprocess(size=32)
DIGITS = SourceSpec(format="digits", split="test", limit=30)


def pixels(batch):
    return batch.reshape(len(batch), -1)[:, ::97]


def ids_of(texts):
    return np.random.default_rng([sum(map(ord, "".join(texts)))]).integers(-9, 9, (len(texts), 32)).astype(np.int64)


def measure(spec, tokenize=ids_of, encode_image=pixels, encode_text=lambda ids: ids.astype("f")):
    return evaluate_items(encode_image, encode_text, evalsets([spec]), PREPROCESS, tokenize)


def test_evaluation_uses_every_caption_and_every_template():
    seen = []

    def tokenize(texts):
        seen.extend(texts)
        return np.asarray([[sum(map(ord, text)) % 97, len(text)] for text in texts])

    sets = evalsets([SourceSpec(format="scenes", split="test", limit=6), DIGITS])
    found = evaluate(lambda p: pixels(p)[:, :2], lambda ids: ids.astype("f"), sets, PREPROCESS, tokenize)
    captions = {caption for index in range(6) for caption in sets[0].source.captions(index)}
    prompts = {template.format(name) for name in sets[1].classes.names for template in sets[1].classes.templates}
    assert len(seen) == len(captions) + len(prompts) and set(seen) == captions | prompts
    assert set(found) == {f"scenes/{way}_r{k}" for way in ("text", "image") for k in (1, 5, 10)} | {
        "scenes/mean_r1",
        "scenes/rsum",
        "digits/top1",
        "digits/top5",
        "digits/mean_per_class_recall",
    }


def test_equal_texts_have_equal_embeddings_in_any_batch():
    calls = []

    def encode(batch):
        calls.append(len(batch))
        return batch + np.float32(len(calls) * 1e-3)  # The encoder rounds differently in every batch.

    texts = ["a", "b", "a", "c", "a"]
    found = encode_texts(encode, lambda texts: np.array([[ord(t), 1.0] for t in texts]), texts, batch=2)
    assert sum(calls) == 3
    assert (found[0] == found[2]).all() and (found[0] == found[4]).all() and (found[0] != found[1]).any()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_broken_model_is_an_error(tower):
    def broken(batch):
        return np.full((len(batch), 32), np.nan, np.float32)

    with pytest.raises(ArtifactError, match="embeddings are not finite"):
        measure(DIGITS, **{f"encode_{tower}": broken})


def folders(root, names, listed=None):
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8), (17 * int(name) if name.isdigit() else 5, 40, 90 * index)).save(
                root / name / f"{index}.png"
            )
    if listed:
        (root / "classnames.txt").write_text("\n".join(listed))
    return SourceSpec(format="folder", images=root, name="things")


def test_numbered_folders_are_labels_of_a_subset_of_the_classes(tmp_path):
    names = [f"thing {i}" for i in range(11)]
    (evalset,) = evalsets([folders(tmp_path, ("0", "2", "10"), names)])
    assert sorted(evalset.labels().tolist()) == [0, 0, 2, 2, 10, 10]  # The folder 10 sorts second but is label 10.
    label_of = {round(float(batch), 3): label for batch, label in zip(reds(evalset), evalset.labels(), strict=True)}

    def knows_them(batch):
        return np.eye(11, dtype=np.float32)[[label_of[round(float(red), 3)] for red in batch[:, 0, 0, 0]]]

    def numbers(texts):
        return np.array([int(text.rsplit(" ", 1)[1]) for text in texts])

    found = evaluate(knows_them, lambda ids: np.eye(11, dtype=np.float32)[ids], [evalset], PREPROCESS, numbers)
    assert found["things/top1"] == found["things/mean_per_class_recall"] == 100


def reds(evalset):
    return np.concatenate([batch[:, 0, 0, 0] for batch in evalset.pixel_batches(PREPROCESS)])


def test_classes_with_the_same_name_tie_and_cause_a_warning(tmp_path, caplog):
    spec = folders(tmp_path, ("0", "1", "2"), ["missile", "shell", "missile"])
    with caplog.at_level(logging.WARNING, "clipress"):
        found = measure(spec)
    assert not found["things/top1"].values[[0, 1, 4, 5]].any()
    assert found["things/top1"].tied >= 4
    assert "things/top1:" in caplog.text and "of 6 queries tie with wrong answers" in caplog.text


def test_there_is_no_warning_without_ties(caplog):
    with caplog.at_level(logging.WARNING, "clipress"):
        measure(DIGITS)
    assert not caplog.text


def test_seen_classes_of_a_recipe_are_reported_separately():
    (evalset,) = evalsets([DIGITS.model_copy(update={"seen": ("three", "seven")})])
    assert evalset.seen == {3, 7}
    found = measure(DIGITS.model_copy(update={"seen": ("three", "seven")}))
    assert len(found["digits/seen_top1"].values) == np.isin(evalset.labels(), [3, 7]).sum()
    assert {"digits/unseen_top1", "digits/harmonic_top1"} <= set(found)
    assert not any("seen" in key for key in measure(DIGITS))


def test_an_unknown_seen_class_is_an_error():
    with pytest.raises(DataError, match=r"'thre'.*Did you mean 'three'"):
        evalsets([DIGITS.model_copy(update={"seen": ("thre",)})])
    with pytest.raises(DataError, match="has no classes"):
        evalsets([SourceSpec(format="scenes", split="test", limit=3, seen=("circle",))])


def test_a_probe_is_trained_on_the_source_with_the_same_name_and_classes(tmp_path, caplog):
    other = folders(tmp_path / "a", ("cat", "dog"))
    train = folders(tmp_path / "b", ("cat", "cow"))
    test = train.model_copy(update={"limit": 3})
    lone = folders(tmp_path / "c", ("ant", "bee")).model_copy(update={"name": "insects"})
    scenes = SourceSpec(format="scenes", split="test", limit=3)
    ((train_set, test_set),) = probe_sets([scenes, test, lone], [other, SourceSpec(format="digits"), train])
    assert train_set.classes.names == ("cat", "cow") and len(train_set.source) == 4 and len(test_set.source) == 3
    assert "insects: no linear probe" in caplog.text


def test_a_probe_without_a_training_source_is_an_error():
    with pytest.raises(DataError, match="no evaluation set with classes has a training source"):
        probe_sets([DIGITS], [SourceSpec(format="scenes")])


def never(batch):
    raise AssertionError("nothing is encoded")


@pytest.mark.parametrize("task", ["clip", "retrieval", "caption"])
def test_images_alone_are_refused_before_anything_is_encoded(tmp_path, task):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    spec = SourceSpec(format="images", images=tmp_path)
    run = dict.fromkeys(("image", "text", "match", "memory", "decode"), never)
    with pytest.raises(RecipeError, match="images has no captions to compare with"):
        task_named(task).evaluate(run, evalsets([spec]), PREPROCESS, ids_of)
    with pytest.raises(RecipeError, match="images has no captions to compare with"):
        task_named(task).samples(evalsets([spec]), PREPROCESS, ids_of)


@pytest.mark.parametrize("task", ["clip", "classification"])
def test_masks_are_refused_where_every_image_has_one_label(task):
    run = {
        "image": lambda inputs: dict.fromkeys(("image_embeds", "logits"), np.eye(5)[: len(inputs["pixel_values"])]),
        "text": lambda inputs: {"text_embeds": np.ones((len(inputs["input_ids"]), 5))},
    }
    with pytest.raises(RecipeError, match="shapes has the label of every pixel, expected one of every image"):
        task_named(task).evaluate(run, evalsets([SourceSpec(format="shapes", limit=3)]), PREPROCESS, ids_of)
