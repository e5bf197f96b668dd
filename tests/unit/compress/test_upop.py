"""UPop as published: its cost of attention, and its softmax scale after slimming."""

from pathlib import Path

import pytest
import torch

import clipress
from clipress.artifact import save_artifact
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.plan import compress_plan_from
from clipress.compress.prune.budget import Align, MinKeep, keep_masks
from clipress.compress.prune.costs import cost_model
from clipress.compress.prune.criterion import CRITERIA
from clipress.compress.prune.gates import Gates, sites
from clipress.compress.prune.search import Prune, groups_of, run
from clipress.compress.settings import Runtime
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import RecipeError
from clipress.models import anatomy, vit
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.recipe import read_recipe
from clipress.tasks import model_from_artifact, task_named


def test_upops_cost_of_an_attention_gate_follows_the_recipe():
    model = new_model(tiny_architecture(layers=1), 0)
    gates = Gates(model.module, "upop")
    gates.remove()
    settings = Prune(budget={"upop": 0.5, "upop_attention": 6}, criterion="upop", steps=1)
    (group,) = groups_of(model, gates.sites, settings.budget)
    assert [curve[1] for curve in group.costs.curves] == [6 if s.kind == "attn" else 1 for s in gates.sites]


def test_the_softmax_scale_is_kept_or_follows_the_new_width_as_published(tmp_path):
    context = Context(
        start_fabric(Runtime(accelerator="cpu")), DataSpec(train=(SourceSpec(format="digits", limit=40),)), 0, title="t"
    )

    def searched(scale):
        settings = Prune(
            budget={"params": 0.5}, criterion="upop", steps=4, update_every=2, batch_size=8, lr=1e-3, softmax_scale=scale,
            align={"head_dim": 1, "ffn": 1}, min_keep={"head_dim": 0, "ffn": 0},
        )  # fmt: skip
        return run(settings, new_model(tiny_architecture(), 0), context)

    (kept, _), (published, _), (texts, _) = (searched(scale) for scale in ("original", "sqrt_k", {"text": "sqrt_k"}))
    original = new_model(tiny_architecture(), 0).module
    width = anatomy.attentions(original)[0].module.qk_dim
    narrower = 0
    for one, other in zip(anatomy.attentions(kept.module), anatomy.attentions(published.module), strict=True):
        assert one.module.qk_dim == other.module.qk_dim
        assert one.module.scale == pytest.approx(width**-0.5)
        assert other.module.scale == pytest.approx(other.module.qk_dim**-0.5)
        narrower += one.module.qk_dim < width
    assert narrower
    for part in anatomy.attentions(texts.module):  # by tower, as published for BLIP
        dims = part.module.qk_dim if part.tower == "text" else width
        assert part.module.scale == pytest.approx(dims**-0.5)
    with pytest.raises(
        RecipeError, match=r"prune\.softmax_scale: expected a tower of this model \(image, text\), found 'txt'"
    ):
        searched({"txt": "sqrt_k"})
    save_artifact(artifact_from_model(published, (), {}), tmp_path / "a")
    again, pixels = model_from_artifact(tmp_path / "a").module, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels), published.module.eval().encode_image(pixels))
        assert not torch.allclose(again.encode_image(pixels), kept.module.eval().encode_image(pixels))


PRESETS = sorted((Path(clipress.__file__).parent / "configs").glob("vit-l-14-336-*-upop*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_presets_run_as_published(path):
    search, recovery = (stage.settings for stage in compress_plan_from(read_recipe(path)).stages)
    for stage in (search, recovery):
        assert (stage.queue_size, stage.epoch_counts) == (57600, "captions")
        assert (stage.lr, stage.warmup_ratio, stage.weight_decay, stage.decay_vectors) == (1e-5, 0, 0.2, True)
        assert stage.betas == (0.9, 0.999) and stage.grad_clip_norm == 1e9  # PyTorch's AdamW, and no clipping
        assert stage.epochs == search.epochs
    # The published recovery goes on with the queue of the search, which no longer holds random rows.
    assert (search.queue_start, recovery.queue_start) == ("random", "empty")
    assert search.criterion == "upop" and search.softmax_scale == "sqrt_k" and search.lr_schedule == "constant"
    assert search.budget.unit == "upop" and search.budget.upop_attention == 36
    assert search.losses == (("upop-kd",) if "kd" in path.stem else ("momentum-contrastive",))
    assert search.update_every == (50 if "flickr30k" in path.stem else 200)
    assert recovery.losses == ("momentum-contrastive",)


def test_biases_are_cut_along_or_lost_as_in_upop_s_code():
    context = Context(
        start_fabric(Runtime(accelerator="cpu")), DataSpec(train=(SourceSpec(format="digits", limit=40),)), 0, title="t"
    )
    student = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32, "labels": ("a", "b")}
    found = {}
    for biases in ("kept", "lost", {"image": "lost"}):
        model = task_named("classification").student_from(student, None, 0)
        for attention in anatomy.attentions(model.module):
            for linear in (attention.module.q, attention.module.k, attention.module.v):
                linear.bias.data.fill_(3.0)
        settings = Prune(
            budget={"params": 0.5}, criterion="magnitude", steps=0, calibrate=8, batch_size=8, refit=False, rotate=False,
            align={"head_dim": 1, "ffn": 1}, losses=["classification"], qkv_biases=biases,
        )  # fmt: skip
        cut, _ = run(settings, model, context)
        found[str(biases)] = torch.cat([one.module.q.bias for one in anatomy.attentions(cut.module)])
    assert bool((found["kept"] == 3).all()) and torch.equal(found["{'image': 'lost'}"], found["lost"])
    assert found["lost"].abs().max() <= 32**-0.5 and found["lost"].std() > 0.05


@pytest.fixture(scope="module")
def deit_small():
    """DeiT-S, without memory for its weights."""
    sizes = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    with torch.device("meta"):
        return vit.build({"timm_model": vit.OWN, "sizes": sizes, "labels": [str(number) for number in range(1000)]})


@pytest.mark.parametrize(("cut", "millions"), [(10, 19.9), (20, 17.8), (30, 15.7), (40, 13.5), (50, 11.4)])
def test_a_cut_deit_has_as_many_parameters_as_upop_s(deit_small, cut, millions):
    """Whatever is kept: an attention gate costs 9,234 parameters and a hidden unit 769, which is the 12 to 1 of the budget."""
    found = sites(deit_small, CRITERIA["upop"].space, {})
    assert {(site.kind, site.units, site.params) for site in found} == {("attn", 64, 9234), ("ffn", 1536, 769)}
    total = sum(parameter.numel() for parameter in deit_small.parameters())
    assert round(total / 1e6, 2) == 22.05
    generator = torch.Generator().manual_seed(cut)
    scores = [torch.rand(site.mask.shape, generator=generator) for site in found]
    costs = cost_model(deit_small, found, "upop", upop_attention=12)
    none = {"align": Align(head_dim=1, ffn=1), "min_keep": MinKeep(head_dim=0, ffn=0), "per_cost": False}
    masks = keep_masks(found, scores, costs, 1 - cut / 100, **none)
    gone = sum(int((~mask).sum()) * site.params for mask, site in zip(masks, found, strict=True))
    assert (total - gone) / 1e6 == pytest.approx(millions, abs=0.06)
