"""Gates, criteria, budgets and schedules, each against something worked out another way."""

import copy

import numpy as np
import pytest
import torch

from clipress.compress.prune.budget import Align, Floor, block_cost, keep_masks
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates, sites
from clipress.compress.prune.schedule import SCHEDULES, progress
from clipress.compress.prune.search import Prune
from clipress.errors import RecipeError
from clipress.models import anatomy, surgery
from clipress.models.load import new_clip
from clipress.models.tiny import tiny_architecture

SPACES = ["separate", "upop"]


def tiny():
    model = new_clip(tiny_architecture(layers=1), 0).model
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.3, 0.3)
    return model


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 400, (batch, 24), generator=generator)
    ids[:, -1] = 49407
    return torch.randn(batch, 3, 32, 32, generator=generator), ids


def per_sample_losses(model):
    pixels, ids = inputs()
    pixels = pixels.to(model.logit_scale.dtype)
    return model.encode_image(pixels).square().sum(1) + model.encode_text(ids).pow(3).sum(1)


@pytest.mark.parametrize("space", SPACES)
def test_open_gates_change_nothing(space):
    model = tiny()
    wanted = per_sample_losses(model).detach()
    gates = Gates(model, space)
    torch.testing.assert_close(per_sample_losses(model), wanted)
    gates.remove()
    torch.testing.assert_close(per_sample_losses(model), wanted)


@pytest.mark.parametrize("space", SPACES)
def test_masked_by_gates_equals_cut(space):
    model = tiny()
    gates = Gates(model, space)
    generator = torch.Generator().manual_seed(0)
    for site in gates.sites:
        order = torch.rand(site.groups, site.units, generator=generator).argsort(1)
        site.mask = (order < site.units // 2).float()
    pixels, ids = inputs()
    with torch.no_grad():
        wanted = model.encode_image(pixels), model.encode_text(ids)
    keeps = gates.keeps()
    gates.remove()
    for block, keep in keeps.values():
        surgery.cut(block, keep)
    with torch.no_grad():
        for a, b in zip(wanted, (model.encode_image(pixels), model.encode_text(ids)), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_a_gates_gradient_per_sample_is_the_slope_of_that_samples_loss(space):
    model = tiny().double()
    gates = Gates(model, space)
    for site in gates.sites:
        site.mask = site.mask.double()
    per_sample_losses(model).sum().backward()
    for site in gates.sites:
        found = site.gradient()
        for group, unit in ((0, 0), (site.groups - 1, site.units - 1)):
            with torch.no_grad():
                site.mask[group, unit] = 1 + 1e-5
                up = per_sample_losses(model)
                site.mask[group, unit] = 1 - 1e-5
                down = per_sample_losses(model)
                site.mask[group, unit] = 1
            np.testing.assert_allclose(found[:, group, unit], (up - down) / 2e-5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_costs_are_what_cutting_really_saves(space):
    from torch.utils.flop_counter import FlopCounterMode

    def macs(model):
        pixels, ids = inputs(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.encode_image(pixels), model.encode_text(ids)
        return counter.get_total_flops() // 2

    whole = tiny()
    for index in range(len(sites(whole, space))):
        model = copy.deepcopy(whole)
        gates = Gates(model, space)
        site = gates.sites[index]
        site.mask[:, -3:] = 0  # three levels
        keeps = gates.keeps()
        gates.remove()
        for block, keep in keeps.values():
            surgery.cut(block, keep)
        saved = anatomy.counts(whole)["params"] - anatomy.counts(model)["params"]
        assert (saved, macs(whole) - macs(model)) == (3 * site.params, 3 * site.macs), site.name


def test_criteria_sum_what_they_say():
    gradient = torch.tensor([[[1.0, -2.0]], [[3.0, 2.0]]])  # two samples, two units
    assert CRITERIA["fisher"].summed(gradient).tolist() == [[10.0, 8.0]]
    assert CRITERIA["taylor"].summed(gradient).tolist() == [[4.0, 4.0]]
    assert CRITERIA["upop"].summed(gradient).tolist() == [[-4.0, 0.0]]  # largest positive sum goes first


def test_a_sample_that_is_not_finite_is_left_out_and_counted():
    model = tiny()
    gates = Gates(model, "separate")
    per_sample_losses(model).sum().backward()
    with torch.no_grad():
        gates.sites[0].copies[0].grad[1, 0, 0] = float("nan")
        wanted = gates.sites[1].gradient()[[0, 2]].double().square().sum(0)
    seen = Accumulator(CRITERIA["fisher"], gates.sites)
    seen.add()
    assert seen.left_out == 1
    torch.testing.assert_close(seen.sums[1], wanted)
    assert all(total.isfinite().all() for total in seen.sums)


def masks(model, scores=None, fraction=0.5, unit="params", align=(4, 16), floor=(0.2, 0.1), per_cost=True):
    found = sites(model, "separate")
    total, fixed = block_cost(model, found, unit)
    generator = torch.Generator().manual_seed(0)
    scores = scores or [torch.rand(s.groups, s.units, generator=generator) for s in found]
    kept = keep_masks(
        found, scores, fraction=fraction, unit=unit, total=total, fixed=fixed, per_cost=per_cost,
        align=Align(head_dim=align[0], ffn=align[1]), floor=Floor(head_dim=floor[0], ffn=floor[1]),
    )  # fmt: skip
    cost = fixed + sum(int(mask[0].sum()) * getattr(s, unit) for mask, s in zip(kept, found, strict=True))
    return found, scores, kept, cost, total


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.9])
def test_a_budget_is_met_within_one_aligned_step(unit, fraction):
    found, _, _, cost, total = masks(tiny(), fraction=fraction, unit=unit)
    largest = max(getattr(s, unit) * (16 if s.kind == "ffn" else 4) for s in found)
    assert fraction * total - largest < cost <= fraction * total


def test_widths_are_aligned_above_their_floor_and_equal_across_heads():
    found, _, kept, _, _ = masks(tiny(), fraction=0.35)
    for site, mask in zip(found, kept, strict=True):
        stride, floor = (16, 0.1) if site.kind == "ffn" else (4, 0.2)
        counts = mask.sum(1)
        assert (counts == counts[0]).all() and counts[0] % stride == 0
        assert counts[0] >= floor * site.units


def test_what_stays_is_worth_more_than_what_goes():
    _, scores, kept, _, _ = masks(tiny(), fraction=0.5)
    for score, mask in zip(scores, kept, strict=True):
        for row, keep in zip(score, mask, strict=True):
            if keep.any() and not keep.all():
                assert row[keep].min() >= row[~keep].max()


def test_an_impossible_budget_says_the_smallest_possible():
    with pytest.raises(RecipeError, match=r"params 0\.050 was asked for.*smallest possible is 0\.\d+"):
        masks(tiny(), fraction=0.05)


@pytest.mark.parametrize("budget", [{"params": 0}, {"params": 1.5}, {"params": -0.2}, {"macs": 1}])
def test_a_ratio_outside_zero_and_one_is_refused(budget):
    from clipress.recipe import checked

    with pytest.raises(RecipeError, match=r"stages\.0\.prune\.budget\.\w+: Input should be"):
        checked(Prune, {"budget": budget, "steps": 1}, "stages.0.prune")


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_to_one_and_stay(name):
    due = [progress(name, step, 100, 0.2) for step in range(100)]
    assert due == sorted(due) and due[79:] == [1.0] * 21


def test_upops_schedule_is_the_published_formula():
    steps, p = 40, 0.75
    for t in range(steps):
        published = p * ((1 - np.cos(np.pi * (t + 1) / steps)) / 2) ** 0.5
        assert p * progress("sine", t, steps, 0.0) == pytest.approx(published)
