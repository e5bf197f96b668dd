"""Convolutional image towers: cutting equals masking, budgets are met, and cut towers are saved and exported."""

import copy
import functools
import warnings

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.prune.budget import Target
from clipress.compress.prune.convnets import ConvPruning, Costs, choose_widths
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import ArtifactError, ClipressError, RecipeError
from clipress.models.convnets import conv_shapes, is_convnet, layers, reshape_convs
from clipress.models.load import build, new_model
from clipress.models.tiny import tiny_architecture

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def timm_tower(name, size=32, proj="linear"):
    tower = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": proj, "image_size": size}
    return {"embed_dim": 16, "custom_text": True, "vision_cfg": tower, "text_cfg": TEXT}


RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 64, "patch_size": None},
    "text_cfg": TEXT,
}
TOWERS = {
    "modified resnet": RESNET,
    "resnet": timm_tower("test_resnet"),
    "efficientnet": timm_tower("test_efficientnet"),
    "mobilenet": timm_tower("mobilenetv3_small_050", proj=""),  # its classifier is the projection
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: layers this small gain nothing from more, and threads are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TOWERS)
def tower(request):
    return request.param


@functools.cache
@torch.no_grad()
def first_model(name):
    model = build(TOWERS[name], 0)
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.visual.parameters(), *model.visual.buffers()]:
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def fresh_model(name):
    """A model with distinct, nontrivial norms and biases."""
    return copy.deepcopy(first_model(name))


def pixels(model, batch=2):
    size = model.visual.image_size
    return torch.randn(
        batch, 3, *((size, size) if isinstance(size, int) else size), generator=torch.Generator().manual_seed(1)
    )


def features(model):
    with torch.no_grad():
        return model.eval().encode_image(pixels(model))


def pruned(tower, **limit):
    """Return the model before and after a random cut."""
    model = fresh_model(tower)
    ConvPruning(model, "random", Target(**limit or {"params": 0.7}), align=4).cut()
    return fresh_model(tower), model


def kept_rows(before, after):
    """Find the remaining rows by their values: bool [rows]."""
    return (before[:, None] == after[None, :]).any(1)


@torch.no_grad()
def mask_outputs(uncut, cut):
    """Make the uncut model output zeros for every channel that was cut."""
    masked, small = 0, layers(cut)
    for name, layer in layers(uncut).items():
        if layer.bias is None:  # the norm that follows is masked instead
            continue
        keep = kept_rows(layer.bias, small[name].bias)
        assert keep.sum() == len(small[name].bias)
        masked += int((~keep).sum())
        layer.register_forward_hook(lambda _, __, out, keep=keep: out * keep[:, None, None])
    return masked


def test_a_cut_tower_computes_what_the_masked_one_computes(tower):
    uncut, cut = pruned(tower)
    before = features(uncut)
    assert mask_outputs(uncut, cut) > 0
    expected = features(uncut)
    assert not torch.allclose(expected, before, rtol=1e-3)
    torch.testing.assert_close(features(cut), expected, atol=1e-5, rtol=1e-5)


def counted(model, unit):
    if unit == "params":
        return sum(p.numel() for p in model.visual.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.visual(pixels(model, 1))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("unit", "fraction"), [("params", 0.7), ("params", 0.9), ("macs", 0.5)])
def test_a_budget_is_met_within_one_aligned_step(tower, unit, fraction):
    uncut, cut = fresh_model(tower), fresh_model(tower)
    pruning = ConvPruning(cut, "random", Target(**{unit: fraction}), align=4)
    costs = pruning.costs
    largest = max(costs.saved(costs.widths, site, 4) for site in range(len(costs.widths)))
    record = pruning.cut()
    left, total = counted(cut, unit), counted(uncut, unit)
    assert fraction * total - largest < left <= fraction * total
    assert record["image_tower_kept"] == round(left / total, 4)


def test_steps_are_cut_in_order_of_score_per_cost():
    # A convolution of 9 weights per pair of channels joins two sites; each site has 10 more weights per channel
    costs = Costs(total=1_000_000, widths=[22, 16], terms=[(9, (0, 1)), (10, (0,)), (10, (1,))])
    scores = [torch.arange(22.0).flip(0), torch.full((16,), 1.5)]
    # The first six of site 0 (to a multiple of 8) are worth 15 and cost 6 * (9 * 16 + 10): 0.016 each; eight of site 1
    # are worth 12 and cost 8 * (9 * 22 + 10) at first: 0.007
    first, second = 8 * (9 * 22 + 10), 6 * (9 * 8 + 10)
    assert choose_widths(costs, scores, 1_000_000 - 1, [8, 8], align=8) == [22, 8]
    assert costs.of([22, 8]) == 1_000_000 - first
    assert choose_widths(costs, scores, 1_000_000 - first, [8, 8], align=8) == [22, 8]
    assert choose_widths(costs, scores, 1_000_000 - first - 1, [8, 8], align=8) == [16, 8]
    assert costs.of([16, 8]) == 1_000_000 - first - second


def test_an_absolute_budget_is_met():
    _, cut = pruned("modified resnet", max_params=1_000_000)
    assert 950_000 < counted(cut, "params") <= 1_000_000


def test_widths_are_aligned_and_above_their_floor(tower):
    model = fresh_model(tower)
    pruning = ConvPruning(model, "random", Target(params=0.95), align=4, min_keep=0.3)
    pruning.fraction = pruning.costs.of(pruning.least) / pruning.costs.total  # everything that may be cut
    before, _, after = conv_shapes(model), pruning.cut(), conv_shapes(model)
    changed = 0
    for name, sizes in before.items():
        for key in sizes.keys() - {"groups"}:
            old, new = sizes[key], after[name][key]
            changed += new < old
            assert new == old or (new % 4 == 0 and 0.3 * old - 0.5 <= new)
    assert changed > 10


@pytest.mark.parametrize("name", ["modified resnet", "mobilenet"])
def test_what_the_head_reads_keeps_its_width(name):
    uncut, cut = pruned(name)
    kept = {"modified resnet": "layer4.0.conv3", "mobilenet": "trunk.conv_head"}[name]
    assert cut.visual.get_submodule(kept).weight.shape[0] == uncut.visual.get_submodule(kept).weight.shape[0]
    if hasattr(cut.visual, "trunk"):
        assert cut.visual.trunk.forward_features(pixels(cut)).shape[1] == cut.visual.trunk.num_features


@pytest.mark.parametrize(
    ("tower", "stem", "streams", "inside"),
    [
        ("modified resnet", 3, 3, 4 * 2),  # four stages; the attention pool reads the output of the last one
        ("efficientnet", 1, 5, 0 + 1 + 1 + 2 + 2),  # blocks: one plain, two that expand, two that also squeeze
    ],
)
def test_every_set_of_channels_that_can_be_cut_is_found(tower, stem, streams, inside):
    assert len(ConvPruning(fresh_model(tower), "random", Target(params=0.99)).sites) == stem + streams + inside


def test_grouped_convolutions_are_not_cut():
    model = fresh_model("resnet")
    model.visual.trunk.layer1[0].conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=4)
    sites = ConvPruning(model, "random", Target(params=0.99)).sites
    touched = {name for site in sites for name in (*site.made_by, *site.read_by)}
    assert "visual.trunk.layer1.0.conv2" not in touched and "visual.trunk.layer2.0.conv2" in touched


@pytest.mark.parametrize("training", [True, False])
def test_tracing_a_tower_changes_nothing_in_it(training):
    model = fresh_model("modified resnet").train(training)
    before = copy.deepcopy(model.state_dict())
    ConvPruning(model, "fisher", Target(macs=0.5))
    assert model.visual.training is training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_frozen_tower_is_cut_like_any_other():
    model = fresh_model("efficientnet")
    expected = ConvPruning(model, "random", Target(macs=0.5)).sites
    assert ConvPruning(model.requires_grad_(False), "random", Target(macs=0.5)).sites == expected


def loss_of(model, batch):
    return model.encode_image(batch).pow(3).sum()


@pytest.mark.parametrize(("criterion", "power"), [("fisher", 2), ("taylor", 1)])
def test_scores_equal_those_of_gates_on_the_channels(tower, criterion, power):
    model = fresh_model(tower)
    pruning = ConvPruning(model, criterion, Target(params=0.9))
    found, batches = layers(model), pixels(model, 4).split(2)
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        pruning.add()
    for index in (0, len(pruning.sites) // 2, len(pruning.sites) - 1):
        site, expected = pruning.sites[index], 0
        for batch in batches:
            gate = torch.ones(site.count, requires_grad=True)
            hooks = [
                found[name].register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate[:, None, None],))
                for name in site.read_by
            ]
            expected = expected + torch.autograd.grad(loss_of(model, batch), gate)[0].abs() ** power
            for hook in hooks:
                hook.remove()
        found_scores = pruning.scores()[index]
        assert found_scores.dtype == torch.float64
        torch.testing.assert_close(found_scores, expected.double(), rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_magnitude_cuts_the_channels_with_the_smallest_weights():
    model = fresh_model("modified resnet")
    weak, block = [3, 5, 6, 11], model.visual.layer2[0]
    with torch.no_grad():
        for tensor in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
            tensor[weak] *= 1e-4
        block.conv2.weight[:, weak] *= 1e-4
    strong = [i for i in range(32) if i not in weak]
    expected = block.bn1.weight[strong].clone()
    ConvPruning(model, "magnitude", Target(params=0.9999), align=4).cut()
    assert torch.equal(block.bn1.weight, expected)


def test_a_micro_batch_that_is_not_finite_is_skipped_and_counted():
    model = fresh_model("resnet")
    pruning = ConvPruning(model, "fisher", Target(params=0.8))
    loss_of(model, pixels(model)).backward()
    pruning.add()
    expected = [total.clone() for total in pruning.scores()]
    model.visual.trunk.layer1[0].conv1.weight.grad[0, 0, 0, 0] = float("inf")
    pruning.add()
    assert pruning.left_out == 1 and pruning.cut()["micro_batches_left_out"] == 1
    assert all(torch.equal(a, b) for a, b in zip(pruning.sums, expected, strict=True))


def test_a_search_without_finite_gradients_is_reported():
    with pytest.raises(ClipressError, match="fisher found no finite gradient"):
        ConvPruning(fresh_model("resnet"), "fisher", Target(params=0.8)).cut()


def test_the_training_loop_feeds_the_scores(tmp_path):
    architecture = tiny_architecture(layers=1) | {"vision_cfg": TOWERS["resnet"]["vision_cfg"], "custom_text": True}
    model = new_model(architecture, 0)
    data = DataSpec(train=(SourceSpec(format="digits", limit=16),))
    pruning = ConvPruning(model.module, "fisher", Target(params=0.7))
    context = Context(start_fabric(Runtime(accelerator="cpu", precision="fp32")), data, 0, title="t")
    train(model, Training(steps=2, batch_size=4), {"contrastive": 1.0}, context, [pruning])
    assert pruning.taken_in == 2 and all(score.sum() > 0 for score in pruning.scores())
    pruning.cut()
    assert counted(model.module, "params") <= 0.7 * counted(build(architecture), "params")


def test_a_cut_tower_is_rebuilt_bitwise_from_its_sizes_and_weights(tower):
    _, cut = pruned(tower)
    again = reshape_convs(build(TOWERS[tower]), conv_shapes(cut))
    again.load_state_dict(cut.state_dict(), strict=True)
    assert conv_shapes(again) == conv_shapes(cut) != conv_shapes(build(TOWERS[tower]))
    assert torch.equal(features(again), features(cut))


def test_a_cut_tower_trains_on(tower):
    _, cut = pruned(tower)
    cut.train()
    before = [p.detach().clone() for p in cut.visual.parameters()]
    optimizer = torch.optim.SGD(cut.visual.parameters(), lr=0.1)
    torch.nn.functional.normalize(cut.encode_image(pixels(cut, 4)), dim=1)[:, 0].sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, cut.visual.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved) and all(p.isfinite().all() for p in cut.parameters())


def test_a_cut_tower_is_exported_and_agrees(tower, tmp_path):
    _, cut = pruned(tower)
    path, image = tmp_path / "image.onnx", pixels(cut)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(cut.visual, (image,), str(path), input_names=["x"], opset_version=18, dynamo=False)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), features(cut), atol=1e-4, rtol=1e-4)


def test_convolutional_towers_are_not_taken_for_transformers(tower):
    assert is_convnet(build(TOWERS[tower]))
    assert not is_convnet(build(tiny_architecture(layers=1)))


def test_an_impossible_budget_reports_the_smallest_possible():
    with pytest.raises(
        RecipeError, match=r"params 0\.050 of the image tower cannot be met.*possible is 0\.\d+"
    ) as caught:
        ConvPruning(fresh_model("modified resnet"), "random", Target(params=0.05), align=4)
    smallest = float(str(caught.value).split("possible is ")[1].split()[0])
    ConvPruning(fresh_model("modified resnet"), "random", Target(params=smallest + 0.001), align=4)


@pytest.mark.parametrize(
    ("criterion", "limit", "message"),
    [
        ("upop", Target(params=0.5), "upop cannot score.*Use one of fisher, taylor, magnitude, random"),
        ("fisher", Target(latency=0.5), "expected params or macs.*found latency"),
    ],
)
def test_settings_that_convolutions_do_not_support_are_rejected(criterion, limit, message):
    with pytest.raises(RecipeError, match=message):
        ConvPruning(fresh_model("resnet"), criterion, limit)


LAYER = "visual.trunk.blocks.1.0.conv_exp"
DEPTHWISE = "visual.trunk.blocks.3.0.conv_dw"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LAYER, None, f"do not describe layer {LAYER}"),
        (LAYER, {"out": "many", "in": 24, "groups": 1}, f"do not describe layer {LAYER}"),
        (LAYER, {"out": 0, "in": 24, "groups": 1}, f"for {LAYER} make no sense"),
        (LAYER, {"out": 1 << 20, "in": 24, "groups": 1}, f"for {LAYER} make no sense"),
        (DEPTHWISE, {"out": 64, "in": 64, "groups": 32}, f"for {DEPTHWISE} make no sense"),
        ("visual.trunk.blocks.9", {"out": 1, "in": 1, "groups": 1}, "name layer visual.trunk.blocks.9"),
    ],
)
def test_invalid_sizes_are_rejected(name, change, message):
    shapes = conv_shapes(build(TOWERS["efficientnet"]))
    shapes[name] = change
    with pytest.raises(ArtifactError, match=message):
        reshape_convs(build(TOWERS["efficientnet"]), shapes)
