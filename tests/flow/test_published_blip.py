"""The recipes of UPop's published BLIP rows say what UPop did, and run for two steps on small files in their data formats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from blip_reference import published, save
from helpers import shipped_in_two_steps
from PIL import Image

import clipress
from clipress.artifact import load_artifact, read_header, save_artifact
from clipress.compress.plan import compress_plan_from
from clipress.compress.prune.budget import smallest_fraction
from clipress.compress.prune.costs import cost_model
from clipress.compress.prune.criterion import CRITERIA
from clipress.compress.prune.gates import sites
from clipress.data.eval_sets import evalsets
from clipress.models import anatomy, blip
from clipress.models.importers import artifact_from_checkpoint
from clipress.recipe import read_recipe
from clipress.tasks import evaluate_model, model_from_artifact, task_named

CONFIGS = Path(clipress.__file__).parent / "configs"
# task, rate, steps between updates, epochs of the search and of the retraining by ratio
PUBLISHED = {
    "blip-nlvr2": ("nlvr", 3e-6, 50, {2: 15, 3: 20, 4: 23, 5: 24, 10: 27}),
    "blip-caption-coco": ("caption", 1e-5, 100, {2: 5, 4: 8}),
    "blip-vqa": ("vqa", 2e-5, 1000, {2: 10, 4: 15}),
    "blip-retrieval-coco": ("retrieval", 1e-5, 200, {2: 6, 4: 9}),
    "blip-retrieval-flickr30k": ("retrieval", 1e-5, 50, {2: 12, 4: 18}),
}
LOSSES = {
    "nlvr": ("classification",),
    "caption": ("lm",),
    "vqa": ("lm",),
    "retrieval": {"momentum-contrastive": {}, "matching": {"negatives": "all"}},
}
# Millions of parameters of the whole model if attention and feed-forward layers are cut alike; for 1 the dense model.
MILLIONS = {
    "nlvr": {1: 259.37, 2: 146.0, 3: 108.2, 4: 89.4, 5: 78.0, 10: 55.4},
    "caption": {1: 223.97, 2: 124.8, 4: 75.2},
    "vqa": {1: 361.48, 2: 205.6, 4: 127.7},
    "retrieval": {1: 223.74, 2: 124.6, 4: 75.0},
}
ROWS = [(family, ratio) for family, (*_, epochs) in PUBLISHED.items() for ratio in epochs]
TEXT = ("text_encoder.", "text_decoder.")


def settings_of(family, ratio, side):
    recipe = read_recipe(CONFIGS / f"{family}-{ratio}x-{side}.yaml")
    return recipe, [stage.settings for stage in compress_plan_from(recipe).stages]


def test_every_row_has_both_recipes():
    wanted = [f"{family}-{ratio}x-{side}" for family, ratio in ROWS for side in ("ours", "upop")]
    assert sorted(path.stem for path in CONFIGS.glob("blip-*.yaml")) == sorted(wanted)


@pytest.mark.parametrize(("family", "ratio"), ROWS)
def test_a_recipe_says_what_upop_did(family, ratio):
    task, rate, every, epochs = PUBLISHED[family]
    recipe, (search, recovery) = settings_of(family, ratio, "upop")
    assert recipe.task == task and recipe.teacher["artifact"] == f"runs/teachers/{family}"
    assert recipe.data == settings_of(family, min(epochs), "upop")[0].data  # which is tested below
    for stage in (search, recovery):
        assert stage.losses == LOSSES[task]
        assert (stage.epochs, stage.batch_size, stage.lr) == (epochs[ratio], 32 * 8, rate)
        assert (stage.optimizer, stage.weight_decay, stage.decay_vectors) == ("adamw", 0.05, True)
        assert (stage.betas, stage.grad_clip_norm) == ((0.9, 0.999), 1e9)  # PyTorch's AdamW, and no clipping
        assert (stage.warmup_ratio, stage.min_lr, stage.drop_path) == (0, 0, 0.1 if task in ("nlvr", "vqa") else 0)
        assert stage.queue_size == (57600 if task == "retrieval" else 0)
        assert stage.epoch_counts == ("captions" if task in ("caption", "retrieval") else "items")
    assert (search.lr_schedule, recovery.lr_schedule) == ("constant", "cosine")
    # The published recovery goes on with the queue of the search, which no longer holds random rows.
    assert (search.queue_start, recovery.queue_start) == ("random" if task == "retrieval" else "empty", "empty")
    assert (search.criterion, search.schedule, search.rotate, search.refit) == ("upop", "sine", False, False)
    assert (search.update_every, search.final_fraction, search.distill_losses) == (every, 0, ())
    assert search.budget.unit == "upop" and search.budget.upop_attention == 36
    assert search.budget.upop == pytest.approx(1 / ratio, abs=1e-3)
    assert (search.align.head_dim, search.align.ffn, search.min_keep.head_dim, search.min_keep.ffn) == (1, 1, 0, 0)
    towers = task_named(task).towers
    assert [search.in_tower("softmax_scale", tower) for tower in towers] == ["original", *["sqrt_k"] * len(towers[1:])]


@pytest.mark.parametrize(("family", "ratio"), ROWS)
def test_our_recipe_trains_on_the_same_data_for_as_long(family, ratio):
    task, _, _, epochs = PUBLISHED[family]
    recipe, (search, recovery, int8) = settings_of(family, ratio, "ours")
    other, _ = settings_of(family, ratio, "upop")
    assert (recipe.task, recipe.teacher, recipe.data) == (other.task, other.teacher, other.data)
    for stage in (search, recovery):
        assert (stage.epochs, stage.batch_size) == (epochs[ratio], 256)
        assert stage.epoch_counts == ("captions" if task in ("caption", "retrieval") else "items")
        taught = {*stage.losses, *getattr(stage, "distill_losses", ())}
        assert taught & {"logits", "affinity"} and taught & {"classification", "lm", "matching"}
    assert search.criterion == "fisher" and int8.epochs == 1


@pytest.mark.parametrize("family", PUBLISHED)
def test_data_are_seen_as_published(family):
    task, ratio = PUBLISHED[family][0], min(PUBLISHED[family][3])
    data = compress_plan_from(settings_of(family, ratio, "upop")[0]).data
    augment = data.augment
    assert (augment.crop_scale, augment.flip, augment.auto_augment) == ((0.5, 1.0), True, "blip")
    assert augment.exchange == (task == "nlvr")
    assert [spec.text_normaliser for spec in data.train] == ["blip"] * len(data.train)
    tested = {spec.text_normaliser for spec in (*data.val, *data.test)}
    assert tested == {"none" if task == "caption" else "blip"}  # references are compared as they are
    for spec in (*data.val, *data.test):
        if task == "caption":
            assert (spec.beam_search.beams, spec.beam_search.shortest, spec.beam_search.longest) == (3, 5, 20)
        if task in ("retrieval", "vqa"):
            assert spec.candidates == (256 if family == "blip-retrieval-coco" else 128)
    if task == "vqa":
        assert [spec.annotations.name for spec in data.train] == ["vqa_train.json", "vqa_val.json", "vg_qa.json"]


@pytest.fixture(scope="module", params=MILLIONS)
def dense(request):
    """A published model, without memory for its weights."""
    image = {"img_size": 480 if request.param == "vqa" else 384, "patch_size": 16, "embed_dim": 768, "depth": 12}
    text = {"vocabulary": 30524, "width": 768, "layers": 12, "heads": 12, "positions": 512}
    more = {"nlvr": {"merges_from": 6}, "vqa": {"answer_length": 16}, "retrieval": {"embed_dim": 256}}
    sizes = {"task": request.param, "image": image | {"num_heads": 12}, "text": text, "context_length": 35}
    with torch.device("meta"):
        return request.param, blip.build(sizes | more.get(request.param, {}))


def test_our_budgets_leave_models_of_the_published_sizes(dense):
    task, model = dense
    counts, found = anatomy.counts(model), sites(model, CRITERIA["fisher"].space, {})
    assert counts["params"] / 1e6 == pytest.approx(MILLIONS[task][1], abs=0.01)
    for family, ratio in ROWS:
        if PUBLISHED[family][0] == task:
            search = settings_of(family, ratio, "ours")[1][0]
            left = counts["params"] - (1 - search.budget.params) * counts["block_params"]
            assert left / 1e6 == pytest.approx(MILLIONS[task][ratio], abs=0.15)
            least = smallest_fraction(found, cost_model(model, found, "params"), search.align, search.min_keep)
            assert least < 0.85 * search.budget.params  # so that the search has a choice


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as the recipes expect it: annotations in the published formats, eight images, and small teachers."""
    root = tmp_path_factory.mktemp("blip")
    images = {"NLVR2": "dev", "coco": "val2014", "flickr": "flickr30k-images", "VQA/Images/mscoco": "train2014"}
    for folder, inner in (images | {"visual-genome": "image"}).items():
        (root / "datasets/vision" / folder / inner).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "datasets/vision" / folder / inner / f"{number}.jpg")
    (root / "annotation").mkdir()
    for name, rows in annotations().items():
        (root / "annotation" / f"{name}.json").write_text(json.dumps(rows))
    for family, (task, *_) in PUBLISHED.items():
        (root / family).mkdir()
        artifact = artifact_from_checkpoint(save(published(task), root / family))
        save_artifact(artifact, root / "runs/teachers" / family)
    return root


def annotations():
    """Return what is in each file, by its name."""
    found = {"answer_list": ["red", "a dog", "word20"]}
    for split in ("train", "dev", "test"):
        found[f"nlvr_{split}"] = [
            {"images": [f"dev/{i}.jpg", f"dev/{7 - i}.jpg"], "sentence": f"Word{i + 10} left of a dog.",
             "label": ("True", "False")[i % 2]}
            for i in range(6)
        ]  # fmt: skip
    for data, folder in (("coco_karpathy", "val2014"), ("flickr30k", "flickr30k-images")):
        found[f"{data}_train"] = [
            {"image": f"{folder}/{i % 6}.jpg", "caption": f"A dog, word{i + 10}!", "image_id": f"{data}_{i % 6}"}
            for i in range(12)
        ]
        for split in ("val", "test"):
            found[f"{data}_{split}"] = [
                {"image": f"{folder}/{i}.jpg", "caption": [f"A red dog word{i + 10}.", "A dog"]} for i in (6, 7)
            ]
    for split in ("train", "val"):
        found[f"vqa_{split}"] = [
            {"question_id": 10 * i, "image": f"train2014/{i}.jpg", "question": f"What word{i + 10}?",
             "answer": ["red"] * 7 + ["a dog"] * 3, "dataset": "vqa"}
            for i in range(6)
        ]  # fmt: skip
    found["vg_qa"] = [
        {"image": f"image/{i}.jpg", "question": f"Is it word{i + 10}?", "answer": "red", "dataset": "vg"}
        for i in range(6)
    ]
    return found


@pytest.mark.parametrize(("family", "ratio"), ROWS)
def test_a_published_recipe_runs_for_two_steps(family, ratio, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    pruned = load_artifact(shipped_in_two_steps(f"{family}-{ratio}x-upop", {"data": {"val": []}}, tmp_path)[1])
    kept = total = 0
    for name, shape in pruned.shapes.items():
        is_text = name.startswith(TEXT)
        assert shape["qk_dim"] == shape["v_dim"]  # one gate for q, k and v
        assert shape["scale"] == pytest.approx((shape["qk_dim"] if is_text else 64) ** -0.5)
        kept += 36 * shape["qk_dim"] + shape.get("ffn", 0)
        total += 36 * 64 + (512 if "ffn" in shape else 0)
    assert kept / total == pytest.approx(1 / ratio, abs=0.01)


@pytest.mark.parametrize(("family", "ratio"), ROWS)
def test_our_recipe_runs_for_two_steps(family, ratio, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    folders = shipped_in_two_steps(f"{family}-{ratio}x-ours", {"data": {"val": []}}, tmp_path)
    recipe, (search, *_) = settings_of(family, ratio, "ours")
    details = read_header(folders[1])["lineage"][-1]["details"]
    assert details["block_params_kept"] == pytest.approx(search.budget.params, abs=0.01)
    int8 = model_from_artifact(folders[-1])
    assert int8.quantization["dtype"] == "int8"
    if ratio == 2:
        scores = evaluate_model(int8, evalsets(compress_plan_from(recipe).data.test))
        assert any(name.endswith(task_named(recipe.task).figures) for name in scores)
