"""Gates, criteria, budgets and schedules, each against an independent computation."""

import copy

import numpy as np
import pytest
import torch
from helpers import tiny_inputs as inputs

from clipress.compress.prune.budget import Align, MinKeep, keep_masks, smallest_fraction
from clipress.compress.prune.costs import cost_model
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates, sites
from clipress.compress.prune.schedule import SCHEDULES, progress
from clipress.compress.prune.search import Prune, Search
from clipress.errors import RecipeError
from clipress.models import anatomy, surgery
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

SPACES = ["separate", "upop"]
HEADS = {"image": ("heads", "ffn"), "text": ("heads",)}


def tiny():
    model = new_model(tiny_architecture(layers=1), 0).module
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.3, 0.3)
    return model


def per_sample_losses(model):
    pixels, ids = inputs()
    pixels = pixels.to(model.logit_scale.dtype)
    return model.encode_image(pixels).square().sum(1) + model.encode_text(ids).pow(3).sum(1)


def cut_as_masked(gates):
    masks = gates.part_masks()
    gates.remove()
    for part, mask in masks:
        surgery.cut(part, mask)


CHOICES = [("separate", None), ("upop", None), ("separate", HEADS)]


@pytest.mark.parametrize("space", SPACES)
def test_open_gates_change_nothing(space):
    model = tiny()
    expected = per_sample_losses(model).detach()
    gates = Gates(model, space)
    torch.testing.assert_close(per_sample_losses(model), expected)
    gates.remove()
    torch.testing.assert_close(per_sample_losses(model), expected)


@pytest.mark.parametrize(("space", "kinds"), CHOICES)
def test_masked_by_gates_equals_cut(space, kinds):
    model = tiny()
    gates = Gates(model, space, kinds)
    generator = torch.Generator().manual_seed(0)
    for site in gates.sites:
        order = torch.rand(site.groups, site.units, generator=generator).argsort(1)
        site.mask = (order < site.units // 2).float()
    pixels, ids = inputs()
    with torch.no_grad():
        expected = model.encode_image(pixels), model.encode_text(ids)
    cut_as_masked(gates)
    with torch.no_grad():
        for a, b in zip(expected, (model.encode_image(pixels), model.encode_text(ids)), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("space", "kinds"), CHOICES)
def test_a_gates_gradient_per_sample_is_the_slope_of_that_samples_loss(space, kinds):
    model = tiny().double()
    gates = Gates(model, space, kinds)
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


@pytest.mark.parametrize(("space", "kinds"), CHOICES)
def test_costs_are_what_cutting_saves(space, kinds):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def macs(model):
        pixels, ids = inputs(1)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.encode_image(pixels), model.encode_text(ids)
        return counter.get_total_flops() // 2

    whole = tiny()
    for index in range(len(sites(whole, space, kinds))):
        model = copy.deepcopy(whole)
        gates = Gates(model, space, kinds)
        site = gates.sites[index]
        levels = 1 if site.kind == "heads" else 3
        site.mask[:, -levels:] = 0
        cut_as_masked(gates)
        saved = anatomy.counts(whole)["params"] - anatomy.counts(model)["params"]
        assert (saved, macs(whole) - macs(model)) == (levels * site.params, levels * site.macs), site.name


def test_criteria_sum_their_formula():
    gradient = torch.tensor([[[1.0, -2.0]], [[3.0, 2.0]]])  # two samples, two units
    assert CRITERIA["fisher"]().summed(gradient).tolist() == [[10.0, 8.0]]
    assert CRITERIA["taylor"]().summed(gradient).tolist() == [[4.0, 4.0]]
    assert CRITERIA["upop"]().summed(gradient).tolist() == [[-4.0, 0.0]]  # the largest positive sum is cut first


def test_upop_ranks_by_all_steps_and_upop_last_by_one():
    found = {}
    for name in ("upop", "upop-last"):
        model = new_model(tiny_architecture(), 0)
        gates = Gates(model.module, CRITERIA[name].space)
        settings = Prune(budget={"upop": 0.5}, criterion=name, steps=9, align={"head_dim": 1, "ffn": 1}, update_every=5)
        search = Search(model, gates, settings, 9, 0, lambda total: total)
        steps = []
        for step in range(3):
            search.before(step, {})
            ((step + 1) * per_sample_losses(model.module).sum()).backward()
            steps.append(-gates.sites[0].gradient().double().sum(0))
            search.after_part(step, torch.tensor(True))
        found[name] = search.seen.sums[0]
        torch.testing.assert_close(steps[1], 2 * steps[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["upop-last"], steps[2])
    torch.testing.assert_close(found["upop"], sum(steps))


def test_a_sample_that_is_not_finite_is_skipped_and_counted():
    model = tiny()
    gates = Gates(model, "separate")
    per_sample_losses(model).sum().backward()
    with torch.no_grad():
        gates.sites[0].copies[3].grad[1, 0, 0] = float("nan")
        expected = gates.sites[1].gradient()[[0, 2]].double().square().sum(0)
    seen = Accumulator(CRITERIA["fisher"](), gates.sites)
    seen.add()
    assert seen.left_out == 1
    torch.testing.assert_close(seen.sums[1], expected)
    assert all(total.isfinite().all() for total in seen.sums)


def masks(model, scores=None, fraction=0.5, unit="params", align=(4, 16), floor=(0.2, 0.1), per_cost=True):
    found = sites(model, "separate")
    costs = cost_model(model, found, unit)
    generator = torch.Generator().manual_seed(0)
    scores = scores or [torch.rand(s.groups, s.units, generator=generator) for s in found]
    kept = keep_masks(
        found, scores, costs, fraction, per_cost=per_cost,
        align=Align(head_dim=align[0], ffn=align[1]), min_keep=MinKeep(head_dim=floor[0], ffn=floor[1]),
    )  # fmt: skip
    cost = costs.fixed + sum(int(mask[0].sum()) * getattr(s, unit) for mask, s in zip(kept, found, strict=True))
    return found, scores, kept, cost, costs.total


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


def test_kept_units_score_higher_than_cut_ones():
    _, scores, kept, _, _ = masks(tiny(), fraction=0.5)
    for score, mask in zip(scores, kept, strict=True):
        for row, keep in zip(score, mask, strict=True):
            if keep.any() and not keep.all():
                assert row[keep].min() >= row[~keep].max()


def test_an_impossible_budget_reports_the_smallest_possible():
    with pytest.raises(RecipeError, match=r"params 0\.050 cannot be met.*smallest possible is 0\.\d+"):
        masks(tiny(), fraction=0.05)


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_the_smallest_fraction_can_be_met_and_no_smaller_one(unit):
    model, align, min_keep = tiny(), Align(head_dim=4, ffn=16), MinKeep(head_dim=0.2, ffn=0.1)
    found = sites(model, "separate")
    smallest = smallest_fraction(found, cost_model(model, found, unit), align, min_keep)
    *_, cost, total = masks(model, fraction=smallest * 1.0001, unit=unit)
    assert cost == pytest.approx(smallest * total)
    with pytest.raises(RecipeError, match="cannot be met"):
        masks(model, fraction=smallest * 0.999, unit=unit)


@pytest.mark.parametrize("budget", [{"params": 0}, {"params": 1.5}, {"params": -0.2}, {"macs": 1}])
def test_a_ratio_outside_zero_and_one_is_rejected(budget):
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


def test_all_heads_and_all_hidden_units_of_a_layer_may_be_cut():
    model = tiny()
    attn, ffn = anatomy.blocks(model)[0].parts
    masked = copy.deepcopy(model)
    masked_attn, masked_ffn = anatomy.blocks(masked)[0].parts
    with torch.no_grad():
        masked_attn.module.out.weight.zero_()
        masked_ffn.linear_out.weight.zero_()
    surgery.cut(attn, surgery.AttnMask(heads=torch.zeros(2, dtype=torch.bool)))
    surgery.cut(ffn, surgery.FfnMask(torch.zeros(128, dtype=torch.bool)))
    pixels, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), masked.encode_image(pixels), atol=1e-5, rtol=1e-5)
    assert surgery.shapes(model)[attn.block] | {"scale": 0} == {
        "heads": 0,
        "qk_dim": 0,
        "v_dim": 0,
        "ffn": 0,
        "scale": 0,
    }
    rebuilt = surgery.reshape(tiny(), surgery.shapes(model))
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt.encode_image(pixels), model.encode_image(pixels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cutting_keeps_the_type_of_the_weights(dtype):
    model = tiny().to(dtype)
    block = anatomy.blocks(model)[0]
    attn, ffn = block.parts
    half = torch.arange(16).expand(2, 16) < 8
    surgery.cut(attn, surgery.AttnMask(half, half))
    surgery.cut(ffn, surgery.FfnMask(torch.arange(128) < 40))
    assert {p.dtype for p in block.module.parameters()} == {dtype}
    assert attn.module.q.weight.shape == (16, 32)


def test_heads_and_their_dims_are_not_searched_together():
    from clipress.recipe import checked

    with pytest.raises(RecipeError, match="Prune heads and dims in separate stages"):
        checked(Prune, {"budget": {"params": 0.5}, "sites": {"image": ["heads", "qk"]}, "steps": 1}, "p")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one of params"),
        ({"params": 0.5, "macs": 0.5}, "exactly one of params"),
        ({"params": 0.5, "image": {"macs": 0.5}}, "exactly one of params"),
        ({"latency": 0.5}, "requires 'costs'"),
    ],
)
def test_a_budget_needs_exactly_one_target(budget, message):
    from clipress.recipe import checked

    with pytest.raises(RecipeError, match=message):
        checked(Prune, {"budget": budget, "steps": 1}, "p")


class TestSearch:
    """Whole searches on a tiny model."""

    @staticmethod
    def prune(architecture=None, **settings):
        from clipress.compress.context import Context
        from clipress.compress.fabric import start_fabric
        from clipress.compress.prune.search import run
        from clipress.compress.settings import Runtime
        from clipress.data.spec import DataSpec, SourceSpec

        fabric = start_fabric(Runtime(accelerator="cpu"))
        context = Context(fabric, DataSpec(train=(SourceSpec(format="digits", limit=40),)), 0, title="t")
        model = new_model(architecture or tiny_architecture(layers=1), 0)
        before = {b.tower: sum(p.numel() for p in b.module.parameters()) for b in anatomy.blocks(model.module)}
        base = {"steps": 4, "update_every": 2, "batch_size": 8, "align": {"head_dim": 4, "ffn": 8}}
        model, details = run(Prune(**{**base, **settings}), model, context)
        after = {b.tower: sum(p.numel() for p in b.module.parameters()) for b in anatomy.blocks(model.module)}
        return model, details, {tower: after[tower] / before[tower] for tower in before}

    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_every_criterion_meets_the_budget(self, criterion):
        _, details, _ = self.prune(budget={"params": 0.6}, criterion=criterion)
        assert 0.5 < details["block_params_kept"] <= 0.6

    def test_a_site_that_cannot_be_aligned_is_reported(self, caplog):
        model, _, _ = self.prune(budget={"params": 0.6}, align={"head_dim": 6, "ffn": 8})
        assert "transformer.resblocks.0.attn.qk has 16 units, which is not a multiple of align (6)" in caplog.text
        assert {part.module.qk_dim for part in anatomy.attentions(model.module)} <= {6, 12, 16}

    def test_each_tower_can_have_its_own_budget(self):
        _, _, kept = self.prune(budget={"image": {"params": 0.4}, "text": {"params": 0.8}})
        assert 0.3 < kept["image"] <= 0.4 and 0.7 < kept["text"] <= 0.8

    def test_a_tower_can_be_left_alone(self):
        _, _, kept = self.prune(budget={"params": 0.5}, sites={"image": ["ffn"], "text": []})
        assert kept["text"] == 1 and kept["image"] <= 0.5

    def test_a_budget_can_be_a_number_of_parameters(self):
        model, _, _ = self.prune(budget={"max_params": 20_000})
        assert 17_000 < anatomy.counts(model.module)["block_params"] <= 20_000

    def test_whole_heads_are_cut(self):
        model, _, _ = self.prune(
            budget={"params": 0.75}, sites={"image": ["heads"], "text": ["heads"]}, min_keep={"heads": 0}
        )
        assert {part.module.heads for part in anatomy.attentions(model.module)} < {0, 1, 2}
        assert all(part.module.qk_dim in (0, 16) for part in anatomy.attentions(model.module))

    def test_a_cost_table_rules_a_latency_budget(self, tmp_path):
        import json

        levels = {"qk": 16, "v": 16, "ffn": 128}
        slow_ffn = {kind: {"levels": [0, n], "ms": [0.0, 8.0 if kind == "ffn" else 1.0]} for kind, n in levels.items()}
        table = {"schema_version": 1, "towers": {"image": slow_ffn, "text": slow_ffn}}
        (tmp_path / "costs.json").write_text(json.dumps(table))
        model, _, _ = self.prune(budget={"latency": 0.5, "costs": tmp_path / "costs.json"}, criterion="random")
        spent = sum(
            attn.module.qk_dim / 16 + attn.module.v_dim / 16 + 8 * ffn.hidden / 128
            for attn, ffn in (block.parts for block in anatomy.blocks(model.module))
        )
        assert 9 <= spent <= 10  # of twenty

    def test_a_missing_cost_table_is_reported_with_the_command_to_make_it(self, tmp_path):
        with pytest.raises(RecipeError, match=r"costs\.json does not exist.*clipress latency-table"):
            self.prune(budget={"latency": 0.5, "costs": tmp_path / "costs.json"})

    def test_the_probe_leaves_the_weights_gradients_alone(self):
        model, _, _ = self.prune(budget={"params": 0.9}, criterion="gauss-newton", lr=0.0, weight_decay=0.0)
        kept = new_model(tiny_architecture(layers=1), 0).module
        assert torch.equal(model.module.visual.conv1.weight, kept.visual.conv1.weight)

    def test_a_convolutional_tower_is_cut_in_the_same_stage_and_read_back(self, tmp_path):
        from clipress.artifact import save_artifact
        from clipress.models.load import artifact_from_model
        from clipress.tasks import model_from_artifact

        vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None}
        resnet = tiny_architecture(layers=1) | {"vision_cfg": vision}
        whole = new_model(resnet, 0).module
        model, details, kept = self.prune(
            resnet, budget={"params": 0.8}, align={"head_dim": 4, "ffn": 8, "channels": 4}
        )
        image = [sum(p.numel() for p in module.visual.parameters()) for module in (whole, model.module)]
        assert kept["text"] <= 0.8 and 0.7 < image[1] / image[0] <= 0.8
        assert details["image_tower_kept"] == pytest.approx(image[1] / image[0], abs=1e-4)
        save_artifact(artifact_from_model(model, (), {}), tmp_path / "a")
        again = model_from_artifact(tmp_path / "a").module
        pixels = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(again.encode_image(pixels), model.module.eval().encode_image(pixels))

    def test_a_convolutional_tower_rejects_a_criterion_without_channel_scores(self):
        vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None}
        with pytest.raises(RecipeError, match=r"upop cannot score.*convolutional"):
            self.prune(tiny_architecture(layers=1) | {"vision_cfg": vision}, budget={"params": 0.8}, criterion="upop")


def test_upops_own_count_is_36_to_1_and_for_its_own_criterion_alone():
    model = tiny()
    found = sites(model, "upop")
    costs = cost_model(model, found, "upop")
    assert costs.fixed == 0
    assert costs.total == sum(36 * site.units if site.kind == "attn" else site.units for site in found)
    assert [curve[1] for curve in costs.curves] == [36 if site.kind == "attn" else 1 for site in found]
    with pytest.raises(RecipeError, match="'upop' requires 'criterion: upop'"):
        Prune(budget={"upop": 0.5}, criterion="fisher", steps=1)
