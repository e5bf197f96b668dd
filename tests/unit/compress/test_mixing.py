"""Mixed and erased batches are what their papers say, and follow from the seed, the step and the process."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import LOSSES, terms_from
from clipress.compress.mixing import Mixing, cut_box, erased, mixed
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.transforms import Augment
from clipress.errors import RecipeError
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named
from clipress.tasks.training import Batch, Features, Sizes

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def images(rows=6, side=16):
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0))


def rng(seed=0):
    return np.random.default_rng(seed)


def test_mixup_is_a_weighted_mean_with_the_image_from_the_other_end():
    x = images()
    found, share = mixed(x, Augment(mixup=0.8), rng())
    assert 0 < share < 1
    torch.testing.assert_close(found, x * share + x.flip(0) * (1 - share))


def test_cutmix_puts_a_box_of_the_other_image_and_counts_its_pixels():
    for seed in range(20):
        x = images()
        found, share = mixed(x, Augment(cutmix=1.0), rng(seed))
        own = (found == x).all(1)  # [B, S, S]
        assert torch.equal(torch.where(own[:, None], x, x.flip(0)), found)
        assert own.float().mean((1, 2)).tolist() == pytest.approx([share] * len(x))


def test_shares_are_timm_s_in_distribution():
    ours = np.array([mixed(images(2), Augment(mixup=0.8, cutmix=1.0), rng(seed))[1] for seed in range(3000)])
    np.random.seed(0)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=2)
    pixels, labels = images(2), torch.tensor([0, 1])
    shares = np.array([float(theirs(pixels.clone(), labels)[1][0, 0]) - 0.05 for _ in range(3000)]) / 0.9
    for part in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(ours, part) == pytest.approx(np.quantile(shares, part), abs=0.03)


def test_a_box_is_centred_anywhere_and_cut_at_the_border():
    boxes = np.array([cut_box((32, 48), 0.75, rng(seed)) for seed in range(500)])
    top, bottom, left, right = boxes.T
    assert (bottom - top).max() == 16 and (right - left).max() == 24 and top.min() == left.min() == 0
    assert bottom.max() == 32 and right.max() == 48 and (bottom - top).min() < 16


def test_erasing_fills_boxes_of_some_images_with_noise():
    x = images(400, 32)
    found = erased(x, 0.25, rng())
    changed = (found != x).any(1)  # [B, S, S]
    rows = changed.flatten(1).any(1)
    assert 70 < int(rows.sum()) < 130
    noise = found[changed[:, None].expand_as(found)]
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)
    for row in changed[rows]:
        down, across = row.any(1).nonzero().flatten(), row.any(0).nonzero().flatten()
        box = (down[-1] - down[0] + 1) * (across[-1] - across[0] + 1)
        assert int(row.sum()) == int(box) and 0.015 < int(box) / row.numel() < 0.35


def test_a_step_is_mixed_the_same_way_again_and_other_steps_and_processes_in_others():
    arrays = {"pixels": images(), "label": torch.arange(6)}
    mixing = Mixing(Augment(mixup=0.8, random_erase=0.5), 1, 0)
    first, again = mixing(3, arrays), mixing(3, arrays)
    assert torch.equal(first["pixels"], again["pixels"]) and first["other_label"].tolist() == [5, 4, 3, 2, 1, 0]
    others = mixing(4, arrays), Mixing(mixing.augment, 1, 1)(3, arrays), Mixing(mixing.augment, 2, 0)(3, arrays)
    assert all(not torch.equal(first["pixels"], other["pixels"]) for other in others)
    assert torch.equal(arrays["pixels"], images())


def test_the_loss_of_mixed_rows_is_timm_s_soft_targets_with_smoothing():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    labels, others = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([6, 5, 4, 3, 2, 1])
    share, smooth = 0.7, 0.1
    kind = LOSSES["classification"]
    loss = kind(kind.Settings(smoothing=smooth), Sizes(10, sides=("image",)))
    batch = Batch(
        Features(logits=logits),
        (),
        labels=labels,
        all_labels=labels,
        other_labels=others,
        shares=torch.full((6,), share),
    )
    hot = [F.one_hot(one, 10).float() * (1 - smooth) + smooth / 10 for one in (labels, others)]
    wanted = SoftTargetCrossEntropy()(logits, share * hot[0] + (1 - share) * hot[1])
    torch.testing.assert_close(loss(batch), wanted)


@pytest.fixture(scope="module")
def fabric():
    return start_fabric(Runtime(accelerator="cpu"))


def digits(**augment):
    return DataSpec(train=(SourceSpec(format="digits", limit=64),), augment=Augment(**augment), repeats=2)


def test_a_classifier_trains_on_mixed_batches(fabric):
    student = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32, "labels": DIGITS}
    model = task_named("classification").student_from(student, None, 0)
    data = digits(mixup=0.8, cutmix=1.0, random_erase=0.25, auto_augment="rand-m5")
    context = Context(fabric, data, 0, title="t")
    settings = Training(steps=3, batch_size=8, lr=1e-3, drop_path=0.1)
    seen = train(model, settings, {"classification": {"smoothing": 0.1}}, context)
    assert seen["last"]["loss"] == pytest.approx(np.log(10), abs=1.0)
    assert not any(type(module).__name__ == "DropPath" for module in model.module.modules())
    (batch,) = batches(model, settings, context, 1)  # as calibration reads them
    assert "share" not in batch


def test_a_clip_is_not_mixed(fabric):
    model, settings = new_model(tiny_architecture(layers=1), 0), Training(steps=1, batch_size=4)
    context = Context(fabric, digits(cutmix=1.0), 0, title="t")
    with pytest.raises(
        RecipeError, match="mixup and cutmix mix the labels of a classifier, which task clip has none of"
    ):
        train(model, settings, ("contrastive",), context)


def test_a_tower_without_such_branches_has_no_drop_path(fabric):
    model, settings = new_model(tiny_architecture(layers=1), 0), Training(steps=1, batch_size=4, drop_path=0.1)
    with pytest.raises(RecipeError, match=r"drop_path: expected a vision transformer of timm's, found none"):
        Learner(model, settings, terms_from(("contrastive",), "t"), Context(fabric, digits(), 0, title="t"))
