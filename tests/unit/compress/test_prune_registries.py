"""Every criterion and schedule works on every kind of model; budgets and sites use the names of its towers."""

import pytest
import torch

from clipress.artifact import save_artifact
from clipress.bench.layers import ELSE, layer_costs
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.prune.budget import Align, Budget, MinKeep, Target, keep_masks
from clipress.compress.prune.convnets import ConvPruning
from clipress.compress.prune.costs import cost_model, part_macs
from clipress.compress.prune.criterion import CRITERIA, Accumulator, Criterion
from clipress.compress.prune.gates import DEFAULT_KINDS, Gates, sites
from clipress.compress.prune.schedule import SCHEDULES, progress
from clipress.compress.prune.search import Prune, groups_of, run
from clipress.compress.settings import Runtime
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import RecipeError
from clipress.models import anatomy, surgery
from clipress.models.load import artifact_from_model, build, new_model
from clipress.models.tiny import tiny_architecture
from clipress.recipe import checked
from clipress.tasks import model_from_artifact, task_named

ALIGN, FLOOR = Align(head_dim=4, ffn=16), MinKeep(head_dim=0.2, ffn=0.1)


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STUDENT = {"width": 48, "layers": 2, "heads": 3, "patch_size": 8, "image_size": 32, "labels": DIGITS}


def classifier_model():
    model = task_named("classification").student_from(STUDENT, None, 0)
    torch.manual_seed(0)
    for parameter in model.module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.4, 0.4)
    return model


def classifier():
    return classifier_model().module.eval()


def pixels(batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def scored(module, name):
    """Accumulate one backward pass and return the gates with every site's scores."""
    criterion = CRITERIA[name]()
    gates = Gates(module, criterion.space)
    seen = Accumulator(criterion, gates.sites)
    if criterion.measures:
        encode = {"image": lambda: module.encode_image(pixels()) if anatomy.is_clip(module) else module(pixels())}
        encode["text"] = lambda: module.encode_text(torch.arange(1, 25).repeat(3, 1))
        errors = criterion.measure(gates.sites, [4] * len(gates.sites), lambda tower: encode[tower]())
        criterion.measured = {site.name: error for site, error in zip(gates.sites, errors, strict=True)}
    outputs = module.encode_image(pixels()) if anatomy.is_clip(module) else module(pixels())
    outputs.square().sum().backward()
    seen.add()
    return gates, seen.scores(lambda total: total)


@pytest.mark.parametrize("make", [classifier, lambda: build(tiny_architecture(layers=1), 0)])
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_every_unit(name, make):
    gates, scores = scored(make(), name)
    assert len(scores) == len(gates.sites) > 0
    for site, score in zip(gates.sites, scores, strict=True):
        assert score.shape == (site.groups, site.units) and score.dtype == torch.float64
        if site.part.tower == "image":
            assert score.isfinite().all() and score.std() > 0


@pytest.mark.parametrize("name", CRITERIA)
def test_a_classifier_is_masked_and_cut_to_the_budget_by_every_criterion(name):
    module = classifier()
    gates, scores = scored(module, name)
    costs = cost_model(module, gates.sites, "params")
    kept = keep_masks(gates.sites, scores, costs, 0.5, align=ALIGN, min_keep=FLOOR, per_cost=CRITERIA[name].per_cost)
    for site, mask in zip(gates.sites, kept, strict=True):
        site.mask = mask.float()
    with torch.no_grad():
        expected = module(pixels())
    before, masks = anatomy.counts(module)["block_params"], gates.part_masks()
    gates.remove()
    for part, mask in masks:
        surgery.cut(part, mask)
    with torch.no_grad():
        torch.testing.assert_close(module(pixels()), expected, atol=1e-5, rtol=1e-5)
    left = anatomy.counts(module)["block_params"]
    largest = max(site.params * (16 if site.kind == "ffn" else 4) for site in gates.sites)
    assert costs.total == before and 0.5 * before - largest < left <= 0.5 * before


def test_the_layers_of_a_classifier_add_up_to_it_and_its_parts_to_its_blocks():
    model = classifier_model()
    module, rows = model.module, layer_costs(model)
    assert [row["name"] for row in rows] == ["blocks.0", "blocks.1", ELSE] and {row["tower"] for row in rows} == {
        "image"
    }
    assert sum(row["params"] for row in rows) == sum(p.numel() for p in module.parameters())
    assert rows[-1]["macs"] == 16 * 3 * 64 * 48 + 48 * 10  # patches and head
    for block, row in zip(anatomy.blocks(module), rows, strict=False):
        assert sum(part_macs(part) for part in block.parts) == row["macs"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_classifier_is_searched_cut_saved_and_read_back(criterion, tmp_path):
    context = Context(
        start_fabric(Runtime(accelerator="cpu")), DataSpec(train=(SourceSpec(format="digits", limit=40),)), 0, title="t"
    )
    settings = Prune(
        budget={"image": {"params": 0.6}}, losses=["classification"], criterion=criterion, steps=4, update_every=2, batch_size=8,
        align=ALIGN, min_keep=FLOOR,
    )  # fmt: skip
    model, details = run(settings, classifier_model(), context)
    assert 0.5 < details["block_params_kept"] <= 0.6
    save_artifact(artifact_from_model(model, ({"stage": "pruned", "hash": "x"},), {}), tmp_path / "pruned")
    again = model_from_artifact(tmp_path / "pruned").module
    with torch.no_grad():
        assert torch.equal(again(pixels()), model.module.eval()(pixels()))


def test_a_gradient_criterion_scores_channels_by_the_same_rule():
    gradient = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert CRITERIA["fisher"]().summed(gradient[None]).tolist() == [1, 4, 9]
    assert CRITERIA["taylor"]().summed(gradient[None]).tolist() == [1, 2, 3]
    assert [name for name in CRITERIA if CRITERIA[name].for_channels] == [
        "fisher", "taylor", "magnitude", "random", "fpgm", "lamp",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CRITERIA if CRITERIA[name].for_channels])
def test_every_criterion_for_channels_cuts_a_convolutional_tower(name):
    vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None}
    module = build(tiny_architecture(layers=1) | {"vision_cfg": vision}, 0)
    pruning = ConvPruning(module, name, Target(params=0.8), align=4)
    module.encode_image(torch.randn(2, 3, 64, 64)).square().sum().backward()
    pruning.add()
    assert 0.7 < pruning.cut()["image_tower_kept"] <= 0.8


def test_a_criterion_that_is_registered_can_be_named_in_a_recipe():
    class FirstUnits(Criterion):
        uses_gradients = False

        def score(self, site, generator):
            return -torch.arange(float(site.units)).expand(site.groups, -1)

    module = classifier()
    gates = Gates(module, FirstUnits.space)
    with CRITERIA.registered("first-units", FirstUnits):
        settings = checked(Prune, {"budget": {"params": 0.5}, "criterion": "first-units", "steps": 1}, "p")
        scores = Accumulator(CRITERIA[settings.criterion](), gates.sites).scores(lambda total: total)
    costs = cost_model(module, gates.sites, "params")
    for mask in keep_masks(gates.sites, scores, costs, 0.5, align=ALIGN, min_keep=FLOOR, per_cost=True):
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("criterion", "fischer", r"p\.criterion: .*unknown criterion 'fischer'. Did you mean 'fisher'"),
        ("schedule", "cubik", r"p\.schedule: .*unknown schedule 'cubik'. Did you mean 'cubic'"),
    ],
)
def test_an_unknown_method_names_the_nearest(key, value, message):
    with pytest.raises(RecipeError, match=message):
        checked(Prune, {"budget": {"params": 0.5}, "steps": 1, key: value}, "p")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_complete_before_the_last_part_of_the_search(name):
    assert progress(name, 79, 100, 0.2) == 1.0 and 0 < progress(name, 0, 100, 0.2) <= 1.0


# towers by name


def test_a_classifier_has_a_budget_for_all_towers_or_for_its_only_one():
    model = classifier_model()
    found = sites(model.module, "separate")
    for budget in (Budget(params=0.5), Budget(image={"params": 0.5})):
        (group,) = groups_of(model, found, budget)
        assert group.members == list(range(len(found))) and group.target == 0.5


def test_a_target_per_tower_is_read_under_any_name_and_checked_against_the_model():
    budget = checked(Budget, {"question": {"macs": 0.5}, "image": {"params": 0.4}}, "budget")
    assert {name: target.unit for name, target in budget.by_tower.items()} == {"question": "macs", "image": "params"}
    assert budget.target_of("question").macs == 0.5 and budget.target_of("text") is None
    assert budget.targets(("image", "question")) == [
        (("image",), Target(params=0.4)),
        (("question",), Target(macs=0.5)),
    ]
    with pytest.raises(
        RecipeError, match=r"prune\.budget: expected a tower of this model \(image, text\), found 'question'"
    ):
        budget.targets(("image", "text"))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"parms": 0.5}, r"unknown key 'parms'. Did you mean 'params'"),
        ({"image": {"parms": 0.5}}, r"p\.budget\.image\.parms: unknown key 'parms'. Did you mean 'params'"),
        ({"image": {"params": 2}}, r"p\.budget\.image\.params: Input should be"),
        ({"image": {}}, "expected exactly one of params.*found image"),
        ({"image": None, "text": None}, "expected exactly one of params.*found none"),
    ],
)
def test_a_mistake_in_a_budget_names_its_place(budget, message):
    with pytest.raises(RecipeError, match=message):
        checked(Prune, {"budget": budget, "steps": 1}, "p")


def test_a_tower_without_a_target_in_a_recipe_is_left_alone():
    assert Budget(image={"params": 0.5}, text=None).targets(("image", "text")) == [(("image",), Target(params=0.5))]


def test_sites_are_named_by_tower_and_default_to_everything():
    module = build(tiny_architecture(layers=1), 0)
    kinds = {(site.part.tower, site.kind) for site in sites(module, "separate", {"image": ["ffn"]})}
    assert kinds == {("image", "ffn"), *(("text", kind) for kind in DEFAULT_KINDS)}
    with pytest.raises(RecipeError, match=r"p\.sites\.image"):
        checked(Prune, {"budget": {"params": 0.5}, "sites": {"image": ["fnn"]}, "steps": 1}, "p")


def test_an_unknown_tower_in_sites_stops_the_search_before_it_starts():
    settings = Prune(budget={"params": 0.5}, sites={"imgae": ["ffn"]}, steps=1)
    with pytest.raises(
        RecipeError, match=r"prune\.sites: expected a tower of this model \(image, text\), found 'imgae'"
    ):
        run(settings, new_model(tiny_architecture(layers=1), 0), None)
