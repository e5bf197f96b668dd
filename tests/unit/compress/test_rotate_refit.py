"""Rotation keeps the function and puts the least into the last dims; a refit restores what the kept units can express."""

import copy
from itertools import combinations

import numpy as np
import open_clip
import pytest
import timm
import torch
from torch import nn

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.prune import search
from clipress.compress.prune.refit import Refit, Regression, cut_and_refit, token_weights
from clipress.compress.prune.rotate import principal_bases, rotate
from clipress.compress.prune.search import Prune
from clipress.compress.settings import Runtime
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.transforms import Preprocess
from clipress.models import anatomy, surgery
from clipress.models.load import Model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named

SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "proj_type": "linear"}


def disturbed(module, seed=0):
    """Give norms, biases and layer scales values that are not their initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data = 0.3 + 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "logit" not in name:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def clip(seed=0, **changes):
    architecture = tiny_architecture(**{key: changes.pop(key) for key in ("width", "head_width") if key in changes})
    architecture["text_cfg"] |= changes.pop("text", {})
    architecture["vision_cfg"] |= changes.pop("vision", {})
    model = new_model(architecture | changes, seed)
    disturbed(model.module, seed)
    return model


def vit(seed=0, **changes):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    module = timm.create_model("vit_tiny_patch16_224", **{**shape, **changes})
    architecture = {"model_name": "vit_tiny_patch16_224", "model_args": {**shape, **changes}}
    return Model(
        disturbed(surgery.use_own_attention(module), seed),
        architecture,
        Preprocess(size=32),
        None,
        task="classification",
    )


MODELS = {
    "CLIP": clip,
    "one head": lambda: clip(head_width=32),
    "many narrow heads": lambda: clip(head_width=4),
    "wide": lambda: clip(width=48, head_width=24),
    "layer scale": lambda: clip(text={"ls_init_value": 0.5}, vision={"ls_init_value": 0.5}),
    "text without a causal mask, pooled at the end, projected by a Linear": lambda: clip(
        text=SIGLIP, custom_text=True, init_logit_bias=-10
    ),
    "timm": vit,
    "timm without biases in attention, with layer scale": lambda: vit(qkv_bias=False, init_values=0.1),
}


def batches(model, count=4, rows=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        pixels = torch.randn(rows, 3, 32, 32, generator=generator)
        if model.task == "classification":
            yield {"image": {"pixel_values": pixels}}
            continue
        ids = torch.randint(1, 400, (rows, 24), generator=generator)
        for row in ids:
            end = int(torch.randint(5, 24, (1,), generator=generator))
            row[end:] = 0
            row[end] = 49407
        yield {"image": {"pixel_values": pixels}, "text": {"input_ids": ids}}


def outputs(model, samples=None):
    task = task_named(model.task)
    with torch.no_grad():
        return [
            next(iter(task.call(model.module, graph, inputs).values()))
            for batch in samples or batches(model, 1, seed=9)
            for graph, inputs in batch.items()
        ]


def show(model, **shape):
    task = task_named(model.task)
    return lambda: [task.call(model.module, g, x) for batch in batches(model, **shape) for g, x in batch.items()]


def moments(attn, samples, model):
    """Return the second moments of queries, centred keys and head outputs, [heads, dim, dim] each, in NumPy."""
    seen = {"q": [], "k": [], "o": []}
    handles = [
        attn.q.register_forward_hook(lambda _, __, y: seen["q"].append(y)),
        attn.k.register_forward_hook(lambda _, __, y: seen["k"].append(y - y.mean(1, keepdim=True))),
        attn.out.register_forward_pre_hook(lambda _, args: seen["o"].append(args[0])),
    ]
    outputs(model, samples)
    for handle in handles:
        handle.remove()
    found = {}
    for name, rows in seen.items():
        rows = torch.cat([one.flatten(0, 1) for one in rows]).double().numpy()
        heads = rows.reshape(len(rows), attn.heads, -1)
        found[name] = np.stack([heads[:, h].T @ heads[:, h] for h in range(attn.heads)])
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 8])
def test_a_rotation_changes_no_output(name, count):
    model = MODELS[name]()
    before, weights = outputs(model), copy.deepcopy(model.module.state_dict())
    rotate(anatomy.attentions(model.module), show(model, count=count))
    for own, other in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert not torch.equal(
        weights[next(n for n in weights if n.endswith("attn.q.weight"))],
        anatomy.attentions(model.module)[0].module.q.weight,
    )


def test_a_rotation_changes_no_output_of_attention_that_was_cut_before():
    model = clip()
    for part in anatomy.attentions(model.module):
        qk, v = torch.ones(2, 16, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)
        qk[0, :8] = qk[1, 4:12] = v[:, :4] = False
        surgery.cut(part, surgery.AttnMask(qk, v))
    before = outputs(model)
    rotate(anatomy.attentions(model.module), show(model))
    for own, other in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_after_a_rotation_both_sides_of_a_product_carry_the_same_in_descending_order():
    model, samples = clip(), None
    samples = list(batches(model, 16))
    rotate(anatomy.attentions(model.module), lambda: outputs(model, samples))
    for part in anatomy.attentions(model.module):
        found, attn = moments(part.module, samples, model), part.module
        columns = attn.out.weight.detach().double().numpy().reshape(32, attn.heads, -1)
        gram = np.stack([columns[:, h].T @ columns[:, h] for h in range(attn.heads)])
        for left, right in ((found["q"], found["k"]), (found["o"], gram)):
            for a, b in zip(left, right, strict=True):
                largest = a.diagonal().max()
                np.testing.assert_allclose(a, np.diag(a.diagonal()), atol=1e-3 * largest)
                np.testing.assert_allclose(a, b, atol=1e-3 * largest)
                assert (np.diff(a.diagonal()) <= 1e-3 * largest).all()


def test_after_a_rotation_the_last_dims_of_a_head_lose_less_than_any_dims_lost_before():
    model = clip(width=8, head_width=4)
    samples = list(batches(model, 16))
    part = anatomy.attentions(model.module)[0]

    def lost(dims):
        rows = []
        with torch.no_grad():
            handle = part.module.out.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
            outputs(model, samples)
            handle.remove()
            dropped = torch.cat(rows)[..., list(dims)] @ part.module.out.weight[:, list(dims)].T
        return float(dropped.square().sum())

    before = min(lost(dims) for dims in combinations(range(4), 2))
    rotate([part], lambda: outputs(model, samples))
    assert lost((2, 3)) < before


def test_directions_that_no_sample_uses_get_an_invertible_turn():
    left, right = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(2, 4, 4, dtype=torch.float64)
    left[0, 0, 0], right[0, :2, :2] = 3.0, torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    a, b = principal_bases(left, right)
    assert a.isfinite().all() and b.isfinite().all()
    torch.testing.assert_close(a @ b.transpose(1, 2), torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_frozen_attention_and_attention_that_no_sample_reaches_stay_bitwise_as_they_are():
    model = clip()
    model.module.visual.requires_grad_(False)
    before = copy.deepcopy(model.module.state_dict())
    images = [{"image": batch["image"]} for batch in batches(model)]
    rotate(anatomy.attentions(model.module), lambda: outputs(model, images))
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_regression_is_ridge_regression_towards_the_old_weights_with_a_free_bias():
    generator = np.random.default_rng(0)
    x, t, w = generator.normal(size=(50, 6)), generator.normal(size=(50, 3)), generator.random(50)
    linear = nn.Linear(6, 3).double()
    old = linear.weight.detach().numpy().copy()
    regression = Regression()
    for rows in (slice(0, 20), slice(20, 50)):
        regression.add(*(torch.from_numpy(part[rows]) for part in (x, t, w)))
    with torch.no_grad():
        regression.solve(linear, 0.1, lambda total: total)
    # The same as ordinary least squares with the penalty as extra rows, on rows scaled by the root of their weight.
    mean = (w[:, None] * x).sum(0) / w.sum()
    penalty = 0.1 * (w[:, None] * (x - mean) ** 2).sum(0).mean()
    rows = np.concatenate(
        [np.c_[x, np.ones(50)] * np.sqrt(w)[:, None], np.c_[np.sqrt(penalty) * np.eye(6), np.zeros(6)]]
    )
    wanted = np.concatenate([t * np.sqrt(w)[:, None], np.sqrt(penalty) * old.T])
    found = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(linear.weight.detach().numpy(), found[:6].T, atol=1e-9)
    np.testing.assert_allclose(linear.bias.detach().numpy(), found[6], atol=1e-9)


def test_constant_inputs_leave_the_weights_and_set_the_bias():
    linear, regression = nn.Linear(3, 2), Regression()
    old, x = linear.weight.detach().clone(), torch.tensor([0.1, 0.7, 0.3])
    for _ in range(3):
        regression.add(x.expand(1000, 3), torch.tensor([5.0, -1.0]).expand(1000, 2))
    with torch.no_grad():
        regression.solve(linear, 1e-6, lambda total: total)
        torch.testing.assert_close(linear.weight, old, rtol=0, atol=0.1)
        torch.testing.assert_close(linear(x), torch.tensor([5.0, -1.0]))


def refitted(model, masks, **settings):
    """Cut a copy of a model and refit it."""
    own = model.copy()
    for tower in anatomy.towers(own.module):
        blocks = [block for block in anatomy.blocks(own.module) if block.tower == tower]
        samples = list(batches(own))
        assert cut_and_refit(
            blocks, own, samples, lambda part: surgery.cut(part, masks[part.name]), Refit(**{"ridge": 1e-6, **settings})
        )
    return own


def just_cut(model, masks):
    own = model.copy()
    for part in anatomy.parts(own.module):
        surgery.cut(part, masks[part.name])
    return own


def keep(model, heads=None, v=None, ffn=None, qk=None):
    """Return masks for every part."""
    masks = {}
    for part in anatomy.parts(model.module):
        if isinstance(part, anatomy.Attn):
            shape = (part.module.heads, part.module.v_dim)
            rows = None if v is None else torch.arange(shape[1]).expand(shape) < v
            masks[part.name] = surgery.AttnMask(qk, rows, None if heads is None else torch.arange(shape[0]) < heads)
        else:
            count = part.hidden if ffn is None else ffn
            masks[part.name] = surgery.FfnMask(torch.arange(part.hidden) < count)
    return masks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, {"target": "own"}, {"probes": 0, "projection": False}])
def test_a_refit_restores_what_duplicates_did(name, settings):
    model = MODELS[name]()
    for part in anatomy.ffns(model.module):  # the second half of the units fires like the first
        half = part.hidden // 2
        with torch.no_grad():
            part.linear_in.weight[half:] = part.linear_in.weight[:half]
            part.linear_in.bias[half:] = part.linear_in.bias[:half]
    masks = keep(model, ffn=anatomy.ffns(model.module)[0].hidden // 2)
    wanted, cut, refit = outputs(model), outputs(just_cut(model, masks)), outputs(refitted(model, masks, **settings))
    for own, other, worse in zip(refit, wanted, cut, strict=True):
        error = float((own - other).norm() / other.norm())
        assert error < 0.02 * float((worse - other).norm() / other.norm()) or error < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_refit_of_an_uncut_model_changes_no_output(name):
    model = MODELS[name]()
    for own, other in zip(outputs(refitted(model, keep(model))), outputs(model), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", [{"v": 8, "ffn": 32}, {"heads": 1}, {"heads": 0}, {"ffn": 0}, {"heads": 0, "ffn": 0}])
def test_a_refitted_model_is_closer_to_the_uncut_one_than_the_cut_one(name, cut):
    model = MODELS[name]()
    attn = anatomy.attentions(model.module)[0].module
    limits = {"v": attn.v_dim // 2, "heads": attn.heads // 2}
    masks = keep(model, **{kind: min(count, limits.get(kind, count)) for kind, count in cut.items()})
    samples = list(batches(model))
    wanted, plain, refit = (outputs(own, samples) for own in (model, just_cut(model, masks), refitted(model, masks)))
    for own, worse, other in zip(refit, plain, wanted, strict=True):
        assert (own - other).norm() < (worse - other).norm()


def test_tokens_that_nothing_reads_count_nothing():
    model = clip()
    (batch,) = batches(model, 1)
    ids = batch["text"]["input_ids"]
    texts = [block for block in anatomy.blocks(model.module) if block.tower == "text"]
    ends = ids.argmax(1)
    for weights in token_weights(texts, model.module, task_named("clip"), [batch], 2):
        after = torch.arange(24)[None] > ends[:, None]
        assert (weights[0][after] == 0).all()
        assert (weights[0][torch.arange(len(ids)), ends] > 0).all()
    images = [block for block in anatomy.blocks(model.module) if block.tower == "image"]
    last = token_weights(images, model.module, task_named("clip"), [batch], 2)[-1][0]
    assert (last[:, 0] > 0).all() and (last[:, 1:] == 0).all()


def test_channels_with_a_layer_scale_of_zero_keep_their_weights():
    model = clip(text={"ls_init_value": 0.5}, vision={"ls_init_value": 0.5})
    block = anatomy.blocks(model.module)[0]
    with torch.no_grad():
        block.module.ls_1.gamma[:3] = 0
    own = refitted(model, keep(model, v=8))
    fitted, before = anatomy.blocks(own.module)[0].module.attn.out, just_cut(model, keep(model, v=8))
    kept = anatomy.blocks(before.module)[0].module.attn.out
    assert torch.equal(fitted.weight[:3], kept.weight[:3]) and not torch.equal(fitted.weight[3:], kept.weight[3:])
    assert all(parameter.isfinite().all() for parameter in own.module.parameters())


@pytest.fixture(scope="module")
def context():
    data = DataSpec(train=(SourceSpec(format="scenes", limit=64),))
    return Context(start_fabric(Runtime(accelerator="cpu")), data, 0, title="pruned")


def settings(**given):
    shape = {
        "budget": {"params": 0.5},
        "align": {"head_dim": 4, "ffn": 16},
        "calibrate": 64,
        "batch_size": 16,
        "steps": 0,
    }
    return Prune(**{**shape, **given})


@pytest.mark.parametrize("criterion", ["fisher", "gauss-newton", "magnitude"])
def test_without_steps_no_optimizer_is_made_and_only_the_cut_changes_weights(criterion, context, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("an optimizer was made")

    monkeypatch.setattr(torch.optim, "AdamW", refused)
    model = clip()
    rows = {part.name: part.module.q.weight.detach().clone() for part in anatomy.attentions(model.module)}
    made, details = search.run(settings(criterion=criterion, rotate=False, refit=False), model.copy(), context)
    assert details["steps"] == 0 and details["block_params_kept"] < 0.51 and details["mask_updates"]
    for part in anatomy.attentions(made.module):
        assert all((row == rows[part.name]).all(1).any() for row in part.module.q.weight)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in made.module.parameters())


def test_rotation_and_refit_are_on_by_default_where_they_help():
    assert settings().rotate is True and settings().refit == Refit()
    trained = settings(steps=20)
    assert trained.rotate is True and trained.refit is False
    published = settings(steps=20, criterion="upop")
    assert published.rotate is False and published.refit is False
    assert settings(steps=20, refit=True).refit == Refit() and settings(refit=False).refit is False
    assert settings(refit={"samples": 5}).refit.samples == 5


@pytest.mark.parametrize("given", [{}, {"steps": 20}, {"refit": False}, {"rotate": False}])
def test_the_settings_in_force_are_shown_and_read_back(given):
    shown = settings(**given).model_dump(mode="json", exclude_none=True)
    assert {"rotate", "refit"} <= shown.keys()
    assert Prune(**shown) == settings(**given)


def test_rotation_and_refit_bring_a_cut_model_closer_to_the_uncut_one(context):
    model = clip()
    wanted = outputs(model)
    errors = []
    for rotated, refit in ((False, False), (True, False), (True, {"samples": 64})):
        made, details = search.run(settings(rotate=rotated, refit=refit), model.copy(), context)
        errors.append(sum(float((a - b).norm()) for a, b in zip(outputs(made), wanted, strict=True)))
        assert details.get("refitted", []) == (["image", "text"] if refit else [])
    assert errors[2] < errors[0] and errors[1] < errors[0]


def test_a_tower_without_samples_is_cut_and_not_refitted(context, tmp_path):
    said = []
    texts = tmp_path / "texts.csv"
    texts.write_text("".join(f"{word}\n" for word in ("red", "green", "blue", "grey") * 20))
    one_sided = Context(
        context.fabric,
        DataSpec(train=(SourceSpec(format="captions", annotations=texts),)),
        0,
        title="pruned",
        say=said.append,
    )
    made, details = search.run(settings(criterion="gauss-newton"), clip(), one_sided)
    assert details["refitted"] == ["text"]
    assert any("the image tower was not refitted" in line for line in said)
    assert all(parameter.isfinite().all() for parameter in made.module.parameters())


def test_open_clip_still_provides_the_layer_scales_that_a_refit_divides_by():
    block = open_clip.transformer.ResidualAttentionBlock(8, 2, ls_init_value=0.5)
    names = {name for name, _ in block.named_parameters()}
    assert {"ls_1.gamma", "ls_2.gamma"} <= names
