"""2:4 and INT8 on plain models, against plain arithmetic."""

import copy

import pytest
import torch
from helpers import RECIPE, SHORT, clipress, write_recipe
from torch import nn

from clipress.artifact import load_artifact
from clipress.compress.bias_correction import correct_biases
from clipress.compress.sparsify import is_two_of_four, zero_two_of_four
from clipress.errors import RecipeError
from clipress.models import quantizers
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def test_the_two_smallest_of_every_four_weights_become_zero():
    model = new_model(tiny_architecture(layers=1), 0).module
    before = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    report = zero_two_of_four(model)
    names, skipped = report.weights, report.skipped
    assert skipped.keys() == {
        "visual.conv1",
        "visual.proj",
        "text_projection",
    }  # three input channels, and bare parameters
    assert set(names) == {f"{name}.weight" for name in before if name not in skipped}
    after = layers(model)
    for name, old in before.items():
        new = after[name].weight.detach()
        if name in skipped:
            assert torch.equal(new, old)
            continue
        groups = old.reshape(-1, 4)
        kept = torch.zeros_like(groups).scatter(1, groups.abs().topk(2, dim=1).indices, 1.0)
        assert torch.equal(new.reshape(-1, 4), groups * kept)


def test_the_model_is_plain_afterwards():
    model = new_model(tiny_architecture(layers=1), 0).module
    kinds = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    zero_two_of_four(model)
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == names


def test_frozen_weights_stay_dense():
    model = new_model(tiny_architecture(layers=1), 0).module
    model.transformer.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = zero_two_of_four(model)
    names, skipped = report.weights, report.skipped
    frozen = {name for name in layers(model) if name.startswith("transformer.")}
    assert frozen and frozen <= skipped.keys() and not any(name.startswith("transformer.") for name in names)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) is (name not in names)
    assert not any(p.requires_grad for p in model.transformer.parameters())


@pytest.mark.parametrize(
    ("row", "holds"),
    [([1, 0, 0, 2], True), ([0, 0, 0, 2], True), ([1, 0, 3, 2], False), ([float("nan"), 0, 0, 1], False)],
)
def test_two_of_four_is_counted_along_the_input(row, holds):
    assert is_two_of_four(torch.tensor([row, [0.0, 0, 0, 0]])) is holds


def test_convolutions_are_counted_along_their_input_channels():
    weight = torch.zeros(1, 4, 2, 1)
    weight[0, :2, 0, 0] = 1
    weight[0, 2:, 1, 0] = 1
    assert is_two_of_four(weight)
    weight[0, 2, 0, 0] = 1
    assert not is_two_of_four(weight)


def quantized(calibrate=True, keep=(), portable=True):
    model = new_model(tiny_architecture(layers=1), 0)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 400, (8, 24), generator=generator)

    def show(module):
        with torch.no_grad():
            module.encode_image(pixels), module.encode_text(ids)

    names = quantizers.quantizable(model.module, keep)
    return quantizers.attach(model.module, names, show if calibrate else None, portable=portable), names, pixels


def test_both_towers_are_quantized_and_calibrated():
    model, names, _ = quantized()
    towers = {name.split(".")[0] for name in names}
    assert towers == {"visual", "transformer"} and len(names) == 1 + 2 * 6
    modules = dict(model.named_modules())
    for name in names:
        assert modules[name].weight_quantizer.is_enabled and modules[name].input_quantizer.is_enabled
        assert modules[name].input_quantizer.amax.numel() == 1 and modules[name].input_quantizer.amax > 0
        assert modules[name].weight_quantizer.amax.numel() == modules[name].weight.shape[0]


@pytest.mark.parametrize(("portable", "largest"), [(True, 64), (False, 127)])
def test_a_quantized_linear_rounds_to_levels_of_seven_bits_or_of_eight(portable, largest):
    model, _, _ = quantized(portable=portable)
    linear = dict(model.named_modules())["visual.transformer.resblocks.0.mlp.c_fc"]
    x = torch.linspace(-1, 1, 32).expand(2, -1) * float(linear.input_quantizer.amax)

    def rounded(values, step, levels):
        return (values / step).round().clamp(-levels, levels) * step

    weight = rounded(linear.weight, linear.weight.abs().amax(1, keepdim=True) / largest, largest)
    expected = rounded(x, linear.input_quantizer.amax / 127, 127) @ weight.T + linear.bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-5)


def test_training_leaves_portable_weights_within_the_levels_they_were_calibrated_to(tmp_path):
    recipe = copy.deepcopy(RECIPE)
    recipe["stages"] = [{"quantize": {"calibrate": 32, **SHORT, "lr": 0.05}}]  # a high rate, which moves weights far
    done = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    artifact = load_artifact(tmp_path / "run" / "int8")
    before = load_artifact(tmp_path / "run" / "teacher").weights
    assert artifact.quantization["portable"]
    for name in artifact.quantization["modules"]:
        weight, scale = artifact.weights[f"{name}.weight"], artifact.weights[f"{name}.weight_quantizer._amax"] / 127
        assert not torch.equal(weight, before[f"{name}.weight"])
        levels = (weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).round().abs()
        assert levels.max() == 64


def test_modules_in_exclude_stay_in_full_precision():
    model, names, _ = quantized(keep=("*.attn.*", "visual.conv1"))
    assert names and not any(".attn." in name or name == "visual.conv1" for name in names)
    assert not dict(model.named_modules())["visual.transformer.resblocks.0.attn.q"].weight_quantizer.is_enabled


def test_excluding_everything_is_rejected():
    with pytest.raises(RecipeError, match="'exclude' leaves no Linear or Conv"):
        quantized(keep=("*",))


def calibrated(seed=0, bias=True):
    """Two Linears with INT8 quantizers, and the inputs that calibrated them; inputs have a mean that rounding moves."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 12, bias=bias), nn.GELU(), nn.Linear(12, 8))
    x = torch.randn(256, 16) + 3 * torch.rand(16)
    exact = copy.deepcopy(model)
    quantizers.attach(model, ["0", "2"], lambda module: module(x))
    return model, exact, x


def test_bias_correction_removes_the_mean_error_of_a_layer():
    model, exact, x = calibrated()
    before = (model[0](x) - exact[0](x)).mean(0)
    assert correct_biases(model, ["0", "2"], lambda module: module(x)) == 2
    assert (model[0](x) - exact[0](x)).mean(0).abs().max() < 1e-5 < before.abs().max()
    assert torch.equal(model[0].weight, exact[0].weight)


def test_bias_correction_adds_no_bias_and_sums_over_processes():
    model, _, x = calibrated(bias=False)
    halves = x.chunk(2)
    other = copy.deepcopy(model)
    assert correct_biases(model, ["0", "2"], lambda module: module(x)) == 1 and model[0].bias is None
    seen = []
    correct_biases(copy.deepcopy(other), ["0", "2"], lambda module: module(halves[1]), lambda t: seen.append(t) or t)
    rest = iter(seen)
    correct_biases(other, ["0", "2"], lambda module: module(halves[0]), lambda t: t + next(rest))
    assert torch.allclose(other[2].bias, model[2].bias, atol=1e-6)


def test_bias_correction_reads_the_channels_of_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1))
    x = torch.rand(32, 3, 9, 9)
    exact = copy.deepcopy(model)
    quantizers.attach(model, ["0"], lambda module: module(x))
    correct_biases(model, ["0"], lambda module: module(x))
    assert (model(x) - exact(x)).mean((0, 2, 3)).abs().max() < 1e-5


def test_the_linears_of_timm_become_int8_too():
    from timm.layers.linear import Linear

    model = nn.Sequential(Linear(8, 4))
    x = torch.randn(16, 8)
    expected = model(x)
    quantizers.attach(model, ["0"], lambda module: module(x))
    assert model[0].weight_quantizer.is_enabled
    assert torch.nn.functional.cosine_similarity(model(x), expected).min() > 0.99


def test_a_layer_that_modelopt_does_not_know_is_named():
    class Other(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Other(8, 4))
    with pytest.raises(RecipeError, match=r"no INT8 form of Other: 0\. List them in 'exclude'"):
        quantizers.attach(model, ["0"], lambda module: module(torch.randn(4, 8)))
