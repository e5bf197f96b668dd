"""The segmentation task: a Segmenter learns masks, is pruned, distilled, exported and measured like other models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipress.artifact import save_artifact
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.losses import LOSSES
from clipress.compress.prune.search import Prune
from clipress.compress.prune.search import run as prune
from clipress.compress.quantize import Quantize
from clipress.compress.quantize import run as quantize
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data import scenes
from clipress.data.eval_sets import evalsets
from clipress.data.spec import Augment, DataSpec, SourceSpec
from clipress.errors import RecipeError
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.metrics.outcomes import percent
from clipress.models.load import artifact_from_model
from clipress.runtime.onnx_session import run_from_onnx
from clipress.tasks import evaluate_model, model_from_artifact, task_named
from clipress.tasks.training import Batch, Features, Sizes

STUDENT = {
    "width": 32, "layers": 2, "heads": 2, "patch_size": 4, "image_size": 32, "decoder_layers": 1,
    "labels": scenes.MASK_CLASSES,
}  # fmt: skip
SETS = evalsets([SourceSpec(format="shapes", split="val", limit=24)])


@pytest.fixture(scope="module")
def context():
    data = DataSpec(train=(SourceSpec(format="shapes", limit=512),), augment=Augment(shift=2, flip=True))
    return Context(start_fabric(Runtime(accelerator="cpu")), data, 0, title="t")


@pytest.fixture(scope="module")
def trained(context):
    model = task_named("segmentation").student_from(STUDENT, None, 0)
    train(model, Training(steps=300, batch_size=16, lr=3e-3), ("segmentation",), context)
    return model


def miou(model):
    return percent(evaluate_model(model, SETS)["shapes/miou"])


def test_it_learns_the_shape_at_every_pixel(trained):
    masks = [mask for _, mask in SETS[0].masks()]
    nothing_found = 100 * np.mean([mask == 0 for mask in masks]) / len(scenes.MASK_CLASSES)
    untrained = task_named("segmentation").student_from(STUDENT, None, 0)
    assert miou(trained) > nothing_found + 5 > miou(untrained) + 5


def test_the_loss_is_the_mean_over_labelled_pixels_of_enlarged_scores():
    scores = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 5, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    masks[0, :5] = 255
    kind = LOSSES["segmentation"]
    loss = kind(kind.Settings(), Sizes(5, sides=("image", "decoder")))
    large = F.interpolate(scores, scale_factor=4, mode="bilinear")
    wanted = F.cross_entropy(large, masks, ignore_index=255)
    torch.testing.assert_close(loss(Batch(Features(scores=scores), (), masks=masks, all_masks=masks)), wanted)
    nothing = torch.full_like(masks, 255)
    assert loss(Batch(Features(scores=scores), (), masks=nothing, all_masks=nothing)) == 0


def test_it_is_cut_distilled_and_quantized_and_its_files_compute_the_same(trained, context, tmp_path):
    from dataclasses import replace

    context = replace(context, teachers=(trained,))
    settings = Prune(
        budget={"params": 0.7}, losses=["segmentation", "logits"], steps=20, batch_size=16, lr=1e-3,
        align={"head_dim": 1, "ffn": 1}, calibrate=32,
    )  # fmt: skip
    model, details = prune(settings, trained.copy(), context)
    assert details["block_params_kept"] == pytest.approx(0.7, abs=0.05)
    train(model, Training(steps=20, batch_size=16, lr=1e-3), ("segmentation", "logits"), context)
    model, _ = quantize(Quantize(steps=2, batch_size=16, calibrate=32, losses=["logits"]), model, context)
    folder = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), tmp_path / "x")
    again = model_from_artifact(folder)
    exported = onnx_from_artifact(folder, tmp_path / "export", OnnxSettings(), SETS)
    assert exported.labels == scenes.MASK_CLASSES and exported.precision == "int8"
    pixels = next(SETS[0].pixel_batches(again.preprocess, 4))
    found = run_from_onnx(exported.onnx("image"))({"pixel_values": pixels})["scores"]
    with torch.no_grad():
        wanted = again.module(torch.from_numpy(pixels)).numpy()
    assert found.shape == (4, 5, 8, 8)
    cosines = (
        (found * wanted).sum((1, 2, 3))
        / np.linalg.norm(found.reshape(4, -1), axis=1)
        / np.linalg.norm(wanted.reshape(4, -1), axis=1)
    )
    assert cosines.min() > 0.99


def test_without_training_it_is_cut_and_refitted_from_images_alone(trained, context):
    settings = Prune(
        budget={"params": 0.7}, criterion="gauss-newton", steps=0, calibrate=32, batch_size=16, refit={"samples": 32},
        align={"head_dim": 1, "ffn": 1},
    )  # fmt: skip
    model, details = prune(settings, trained.copy(), context)
    assert details["refitted"] == ["image", "decoder"] and miou(model) > miou(trained) - 15


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "expected class names in labels, found none"),
        ({"labels": ["a"], "image_size": 30, "patch_size": 16}, "image_size: expected a multiple of patch_size"),
        ({"labels": ["a"], "width": 30, "heads": 4}, "width: expected a multiple of heads"),
    ],
)
def test_a_student_that_cannot_be_built_is_refused(section, message):
    with pytest.raises(RecipeError, match=message):
        task_named("segmentation").check_student(section, has_teacher=False)


def test_images_without_masks_are_refused(context):
    from dataclasses import replace

    model = task_named("segmentation").student_from(STUDENT, None, 0)
    data = DataSpec(train=(SourceSpec(format="scenes", limit=16),))
    with pytest.raises(RecipeError, match=r"losses on masks require the label of every pixel, but scenes has no masks"):
        train(model, Training(steps=1, batch_size=4), ("segmentation",), replace(context, data=data))
    with pytest.raises(RecipeError, match="scenes has no masks"):
        evaluate_model(model, evalsets([SourceSpec(format="scenes", split="val", limit=4)]))


@pytest.mark.parametrize("labels", [("a", "b", "c"), tuple("abcdefg")])
def test_a_set_of_another_number_of_classes_is_refused(labels):
    model = task_named("segmentation").student_from({**STUDENT, "labels": labels}, None, 0)
    with pytest.raises(RecipeError, match=rf"expected the model's {len(labels)} classes, found 5 in shapes"):
        evaluate_model(model, SETS)


def test_masks_of_other_classes_are_refused(context):
    model = task_named("segmentation").student_from({**STUDENT, "labels": ("a", "b", "c", "d", "e")}, None, 0)
    with pytest.raises(RecipeError, match=r"as the classes of shapes, found 5 \(background, circle, square"):
        train(model, Training(steps=1, batch_size=4), ("segmentation",), context)
