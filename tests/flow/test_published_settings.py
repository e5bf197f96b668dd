"""The shipped recipes of published systems run for two steps on small files in their data formats."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import shipped_in_two_steps, shorten
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import clipress
from clipress.artifact import load_artifact, read_header, save_artifact
from clipress.compress.pipeline import compress
from clipress.compress.plan import compress_plan_from
from clipress.models import segmenter, surgery
from clipress.models.importers import artifact_from_checkpoint
from clipress.models.load import artifact_from_model, new_model
from clipress.recipe import Recipe, checked, read_recipe

CONFIGS = Path(clipress.__file__).parent / "configs"
WIDTHS = {"ViT-B-16": 512, "ViT-B-32": 512, "ViT-L-14": 768}  # Widths of the teachers' embeddings.
PUBLISHED = [
    "clip-kd-vit-t-16", "clip-kd-vit-l-14-to-vit-b-16", "clip-distill-image", "clip-distill-text", "resnet18-embeddings",
    "resnet18-labels", "resnet18-sparse", "resnet18-int8", "tinyclip-vit-40m-32",
]  # fmt: skip
NUM_IMAGES = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Eight images of noise, annotated in every format that the recipes use."""
    root = tmp_path_factory.mktemp("files")
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        for folder in ("images", f"classes/{('cat', 'dog')[number % 2]}"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number}.jpg")
    rows = [(f"image number {number}", f"{number}.jpg") for number in range(NUM_IMAGES)]
    (root / "csv").write_text("title\tfilepath\n" + "".join(f"{text}\t{path}\n" for text, path in rows))
    (root / "captions").write_text("".join(f"{text}\thttp://example/{path}\n" for text, path in rows))
    pairs = [{"image": path, "caption": text, "image_id": path} for text, path in rows]
    (root / "karpathy").write_text(json.dumps(pairs))
    return root


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A small teacher per embedding width, with the real input sizes: images of 224 pixels, texts of 77 tokens."""
    home = tmp_path_factory.mktemp("teachers")
    for width in set(WIDTHS.values()):
        tower = {"width": 64, "layers": 1}
        config = {
            "embed_dim": width,
            "vision_cfg": {"image_size": 224, "patch_size": 32, "head_width": 32, **tower},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **tower},
        }
        lineage = ({"stage": "teacher", "hash": f"small-{width}"},)
        save_artifact(artifact_from_model(new_model(config, 0), lineage, {}), home / str(width))
    return home


def on_small_files(source, files):
    paths = {"csv": "images", "karpathy": "images", "images": "images", "folder": "classes"}
    changed = {key: value for key, value in source.items() if key not in ("annotations", "images", "limit")}
    if source["format"] in paths:
        changed["images"] = str(files / paths[source["format"]])
    if source["format"] in ("csv", "karpathy", "captions"):
        changed["annotations"] = str(files / source["format"])
    return changed


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_runs_for_two_steps(name, files, teachers, tmp_path):
    recipe = read_recipe(CONFIGS / f"{name}.yaml").model_dump(exclude_none=True)
    small = copy.deepcopy(recipe)
    train = [on_small_files(source, files) for source in recipe["data"]["train"]]
    small["data"] |= {"train": train, "val": [], "test": [], "workers": 0}
    shorten(small)
    if "inherit" in recipe["student"]:  # Weights are inherited from the real architecture.
        small["teacher"] = recipe["teacher"] | {"checkpoint": "random"}
    else:
        small["teacher"] = {"artifact": str(teachers / str(WIDTHS[recipe["teacher"]["model"]]))}
    if isinstance(small["student"].get("image"), dict):
        small["student"]["image"] |= {"pretrained": False}
    folders = compress(compress_plan_from(checked(Recipe, small, "")), tmp_path, lambda _: None)
    for folder, stage in zip(folders[1:], small["stages"], strict=True):
        record = read_header(folder)["lineage"][-1]
        ((kind, settings),) = stage.items()
        assert record["kind"] == kind and record["details"]["steps"] == 2
        losses = settings["losses"] if isinstance(settings["losses"], dict) else dict.fromkeys(settings["losses"])
        assert set(record["details"]["last"]) == {"loss", *losses}
        assert all(np.isfinite(value) for value in record["details"]["last"].values())


NEAR = {"ours": 0.03, "upop": 0.06}  # 12 to 1 is what an attention gate costs in DeiT-S; in a small model it costs less
DEIT = sorted(path.stem for path in CONFIGS.glob("deit-*.yaml"))


def assert_is_cut(pruned, name):
    """The percentage in a recipe's name is what its search cuts."""
    kept, side = read_header(pruned)["lineage"][-1]["details"]["block_params_kept"], name.rsplit("-", 1)[1]
    assert kept == pytest.approx(1 - int(name.split("-")[3]) / 100, abs=NEAR[side])


@pytest.fixture(scope="module")
def small_deit(tmp_path_factory):
    """A small DeiT of two classes, imported from a file as they are published."""
    home = tmp_path_factory.mktemp("deit")
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, embed_dim=128, depth=2, num_heads=2, num_classes=2)
    torch.save({"model": model.state_dict()}, home / "deit.pth")
    artifact = artifact_from_checkpoint(home / "deit.pth")
    return save_artifact(
        replace(artifact, architecture={**artifact.architecture, "labels": ["cat", "dog"]}), home / "deit"
    )


@pytest.mark.parametrize("name", DEIT)
def test_a_recipe_of_deit_runs_for_two_steps(name, files, small_deit, tmp_path):
    train = [{"format": "folder", "images": str(files / "classes")}]
    changed = {"data": {"train": train, "val": train, "test": []}, "teacher": {"artifact": str(small_deit)}}
    pruned = shipped_in_two_steps(name, changed, tmp_path)[1]
    assert_is_cut(pruned, name)
    assert {shape["scale"] for shape in load_artifact(pruned).shapes.values()} == {64**-0.5}


SEGMENTER = sorted(path.stem for path in CONFIGS.glob("segmenter-*.yaml"))


@pytest.fixture(scope="module")
def small_segmenter(tmp_path_factory):
    """A small Segmenter of ADE20K's classes, imported from a file as they are published, and four images with masks."""
    home = tmp_path_factory.mktemp("segmenter")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2}
    labels = [str(number) for number in range(150)]
    model = segmenter.build({"sizes": sizes, "labels": labels, segmenter.DECODER: 2}, 0)
    torch.save({"model": surgery.stock_weights(model), "n_cls": 150}, home / "checkpoint.pth")
    for number in range(4):
        rng = np.random.default_rng(number)
        pixels, values = (
            rng.integers(0, 256, (50, 70, 3), dtype=np.uint8),
            rng.integers(0, 151, (50, 70), dtype=np.uint8),
        )
        for kind, suffix, image in (("images", "jpg", pixels), ("annotations", "png", values)):
            path = home / "ade" / kind / "training" / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return save_artifact(artifact_from_checkpoint(home / "checkpoint.pth"), home / "dense"), home / "ade"


@pytest.mark.parametrize("name", SEGMENTER)
def test_a_recipe_of_segmenter_runs_for_two_steps(name, small_segmenter, tmp_path):
    dense, images = small_segmenter
    data = {"train": [{"format": "ade20k", "images": str(images)}], "val": [], "test": []}
    pruned = shipped_in_two_steps(name, {"data": data, "teacher": {"artifact": str(dense)}}, tmp_path)[1]
    assert_is_cut(pruned, name)


def test_every_ratio_of_segmenter_has_both_recipes():
    assert SEGMENTER == sorted(
        f"segmenter-small-ade20k-{cut}-{side}" for cut in (10, 15, 20, 30) for side in ("ours", "upop")
    )


def test_every_ratio_of_deit_has_both_recipes():
    assert DEIT == sorted(
        f"deit-small-imagenet-{cut}-{side}" for cut in (10, 20, 30, 40, 50) for side in ("ours", "upop")
    )


def test_every_shipped_recipe_with_a_student_is_tested():
    shipped = {path.stem for path in CONFIGS.glob("*.yaml") if "student" in yaml.safe_load(path.read_text())}
    assert shipped - {"demo-teacher"} == set(PUBLISHED)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vit-l-14-336-*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_clips_that_upop_fine_tuned_prepare_data_as_upop_does(path):
    """UPop trains with RandomResizedCrop(0.5 to 1), mirror images, BLIP's RandomAugment(2, 5) and BLIP's `pre_caption`."""
    data = compress_plan_from(read_recipe(path)).data
    augment = data.augment
    assert (augment.crop_scale, augment.flip, augment.auto_augment) == ((0.5, 1.0), True, "blip")
    assert {source.text_normaliser for source in (*data.train, *data.val, *data.test)} == {"blip"}
