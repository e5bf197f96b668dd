"""`hessian` against autograd sample by sample, `module-error` against a model whose weights are set to zero."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_inputs as inputs

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.module_error import groups_by_magnitude
from clipress.compress.prune.search import Prune, run
from clipress.compress.settings import Runtime
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models import anatomy
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

DIMS = {"image": ("qk", "v", "ffn"), "text": ("qk", "v", "ffn")}
HEADS = {"image": ("heads", "ffn"), "text": ("heads",)}


def tiny():
    model = new_model(tiny_architecture(layers=1), 0).module
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.3, 0.3)
    return model.eval()


def losses(model):
    pixels, ids = inputs()
    return model.encode_image(pixels).square().sum(1) + model.encode_text(ids).pow(3).sum(1)


def per_weight(model):
    """Sum of g^2 w^2 over samples for every weight, from a backward pass per sample."""
    total = {}
    for number in range(3):
        model.zero_grad()
        losses(model)[number].backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + (parameter.grad * parameter).detach().double().square()
    return total


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kinds", [DIMS, HEADS])
def test_hessian_sums_squared_gradients_times_squared_weights(kinds, frozen):
    model = tiny()
    squares = per_weight(model)
    model.zero_grad()
    model.requires_grad_(not frozen)
    gates = Gates(model, "separate", kinds)
    seen = Accumulator(CRITERIA["hessian"](), gates.sites)
    losses(model).sum().backward()
    seen.add()
    names = {id(module): name for name, module in model.named_modules()}
    for site, score in zip(gates.sites, seen.scores(lambda total: total), strict=True):
        part = site.part
        if site.kind == "ffn":
            rows, columns = (
                squares[f"{names[id(part.linear_in)]}.weight"],
                squares[f"{names[id(part.linear_out)]}.weight"],
            )
            expected = rows.sum(1) + columns.sum(0)
        else:
            at = names[id(part.module)]
            first, second = ("q", "k") if site.kind == "qk" else ("v", "out")
            other = squares[f"{at}.{second}.weight"]
            expected = squares[f"{at}.{first}.weight"].sum(1) + (other.sum(1) if second == "k" else other.sum(0))
        torch.testing.assert_close(score, expected.reshape(site.groups, site.units, -1).sum(2), rtol=1e-4, atol=1e-12)


def without(model, site, group):
    """Set the weights that read the units of a group to zero, or for queries those that produce them."""
    changed = copy.deepcopy(model)
    (part,) = [part for part in anatomy.parts(changed) if part.name == site.part.name]
    with torch.no_grad():
        if site.kind == "ffn":
            part.linear_out.weight[:, group[0]] = 0
            return changed
        attn = part.module
        if site.kind == "heads":
            for head in group[0]:
                attn.out.weight.view(-1, attn.heads, attn.v_dim)[:, head] = 0
            return changed
        for head, dims in enumerate(group):
            for dim in dims:
                if site.kind == "qk":
                    attn.q.weight[head * attn.qk_dim + dim] = attn.q.bias[head * attn.qk_dim + dim] = 0
                else:
                    attn.out.weight[:, head * attn.v_dim + dim] = 0
    return changed


@pytest.mark.parametrize("kinds", [DIMS, HEADS])
def test_module_error_is_what_the_embeddings_lose_without_a_group(kinds):
    model, (pixels, ids) = tiny(), inputs()
    plain = copy.deepcopy(model)
    gates, criterion = Gates(model, "separate", kinds), CRITERIA["module-error"]()

    def embed(of, tower):
        return of.encode_image(pixels) if tower == "image" else of.encode_text(ids)

    strides = [1 if site.kind == "heads" else 4 for site in gates.sites]
    found = criterion.measure(gates.sites, strides, lambda tower: embed(model, tower))
    for site, step, errors in zip(gates.sites, strides, found, strict=True):
        assert bool((site.mask == 1).all())
        groups = groups_by_magnitude(site, step)
        assert sorted(torch.cat(groups, 1)[0].tolist()) == list(range(site.units))
        for group in groups:
            with torch.no_grad():
                changed, whole = embed(without(plain, site, group), site.part.tower), embed(plain, site.part.tower)
            expected = float(1 - F.cosine_similarity(changed, whole).mean())
            share = errors.gather(1, group)
            assert share.unique().numel() == 1 and float(share.sum()) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_units_that_are_cut_are_neither_removed_again_nor_scored():
    model = tiny()
    gates, criterion = Gates(model, "separate", DIMS), CRITERIA["module-error"]()
    site = next(site for site in gates.sites if site.kind == "ffn")
    site.mask[0, :10] = 0
    assert all((group >= 10).all() for group in groups_by_magnitude(site, 16))
    assert sum(group.shape[1] for group in groups_by_magnitude(site, 16)) == site.units - 10
    (errors,) = criterion.measure([site], [16], lambda tower: model.encode_image(inputs()[0]))
    assert not errors[0, :10].any() and errors[0, 10:].min() > 0


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", ["hessian", "module-error"])
def test_units_without_effect_are_cut_first(name, steps):
    """The first 64 hidden units of every feed-forward reach nothing."""
    model = new_model(tiny_architecture(layers=1), 0)
    for part in anatomy.ffns(model.module):
        part.linear_out.weight.data[:, :64] = 0
        part.linear_in.weight.data[:64] *= 3  # so that magnitude alone does not tell
    before = [part.linear_in.weight.detach().clone() for part in anatomy.ffns(model.module)]
    context = Context(
        start_fabric(Runtime(accelerator="cpu")), DataSpec(train=(SourceSpec(format="scenes", limit=16),)), 0, title="t"
    )
    settings = Prune(
        budget={"params": 0.72}, sites={"image": ["ffn"], "text": ["ffn"]}, criterion=name, steps=steps, batch_size=8,
        calibrate=16, lr=0.0, weight_decay=0.0, align={"ffn": 16}, min_keep={"ffn": 0}, refit=False, rotate=False,
    )  # fmt: skip
    run(settings, model, context)
    for part, weight in zip(anatomy.ffns(model.module), before, strict=True):
        kept = torch.cdist(part.linear_in.weight.detach(), weight).argmin(1)
        assert part.hidden < 128 and (kept >= 64).sum() == 64
