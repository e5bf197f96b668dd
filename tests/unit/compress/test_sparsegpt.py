"""SparseGPT's zeros and its adjusted weights, against least squares."""

import pytest
import torch
from torch import nn

from clipress.compress import sparsify
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.settings import Runtime
from clipress.compress.sparsegpt import compensated
from clipress.compress.sparsify import Sparsify, is_two_of_four, zero_two_of_four
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture


def correlated(samples=512, features=32):
    """Inputs with redundant features, so that one weight can compensate for another."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(samples, features // 4, generator=generator)
    mixing = torch.randn(features // 4, features, generator=generator)
    return common @ mixing + 0.3 * torch.randn(samples, features, generator=generator)


def layer():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 16))


def sparse(x):
    model = layer()
    report = zero_two_of_four(model, (lambda m: m(x)) if x is not None else None)
    assert report.weights == ["0.weight"] and not report.skipped and not report.by_magnitude
    assert is_two_of_four(model[0].weight)
    return model


def test_surviving_weights_move():
    dense, model = layer()[0].weight.detach(), sparse(correlated())
    left = model[0].weight.detach()
    still = torch.isclose(left, dense)[left != 0].float().mean()
    assert still < 0.1  # only weights to the left of every zero stay unchanged
    assert torch.equal(model[0].bias, layer()[0].bias)


def test_less_of_the_output_is_lost_than_by_magnitude():
    x, y = correlated(), layer()(correlated())
    lost = [(model(x) - y).square().mean().item() for model in (sparse(x), sparse(None))]
    assert lost[0] < 0.5 * lost[1]


def test_remaining_weights_are_close_to_least_squares_for_the_zeros():
    x, dense, model = correlated().double(), layer()[0].weight.detach().double(), sparse(correlated())
    found, lost, least = model[0].weight.detach().double(), 0.0, 0.0
    for row, wanted in zip(found, dense, strict=True):
        keep = row != 0
        best = torch.linalg.lstsq(x[:, keep], x @ wanted).solution
        least += (x[:, keep] @ best - x @ wanted).square().sum()
        lost += (x @ row - x @ wanted).square().sum()
    magnitude = (x @ (sparse(None)[0].weight.detach().double() - dense).T).square().sum()
    assert least <= lost < least + 0.35 * (magnitude - least)


def test_independent_features_cannot_compensate_for_each_other():
    weight = torch.arange(1.0, 9.0).reshape(1, 8)
    keep = torch.tensor([[False, True, True, False] * 2])
    assert torch.equal(compensated(weight, keep, torch.eye(8)), weight * keep)


def test_the_last_column_compensates_for_its_duplicate():
    hessian = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    root = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    moved = compensated(torch.tensor([[2.0, 3.0]]), torch.tensor([[False, True]]), root)
    torch.testing.assert_close(moved, torch.tensor([[0.0, 3.0 + 2.0 * 0.999]]))


def test_a_layer_that_no_sample_reaches_uses_magnitude():
    model, expected = layer(), sparse(None)
    assert zero_two_of_four(model, lambda m: None).by_magnitude == ["0.weight"]
    assert torch.equal(model[0].weight, expected[0].weight)


def test_convolutions_use_magnitude_along_their_input_channels():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1)), torch.randn(2, 16, 5, 5)
    dense = model[0].weight.detach().clone()
    zeros = zero_two_of_four(model, lambda m: m(x))
    left = model[0].weight.detach()
    assert (
        zeros.weights == zeros.by_magnitude == ["0.weight"]
        and is_two_of_four(left)
        and torch.equal(left, dense * (left != 0))
    )


def test_inputs_with_extra_axes_are_used_completely():
    x = correlated()
    flat, square = sparse(x), sparse(x.reshape(8, 8, 8, 32))
    torch.testing.assert_close(flat[0].weight, square[0].weight)


def test_the_stage_returns_a_plain_model_whose_zeros_hold():
    messages = []
    context = Context(
        start_fabric(Runtime(accelerator="cpu")),
        DataSpec(train=(SourceSpec(format="digits", limit=40),)),
        0,
        title="sparse",
        say=messages.append,
    )
    settings = Sparsify(method="sparsegpt", steps=2, calibrate=16, batch_size=8, losses=["contrastive"])
    model = new_model(tiny_architecture(layers=1), 0)
    names = list(model.module.state_dict())
    made, details = sparsify.run(settings, model, context)
    weights = dict(made.module.named_parameters())
    assert list(made.module.state_dict()) == names and details["sparse_weights"] == 12
    assert all(is_two_of_four(weights[name]) and (weights[name] != 0).any() for name in made.sparsity["weights"])
    assert details["skipped"] == made.sparsity["skipped"] and made.sparsity["method"] == "sparsegpt"
    assert messages[0] == "sparse: 2:4 in 12 weights" and details["by_magnitude"] == []
    assert "sparse: visual.conv1 stays dense: 32 x 3; 2:4 requires a multiple of 8 x a multiple of 16" in messages


def test_layers_that_use_magnitude_are_listed_and_reported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 12))
    zeros = zero_two_of_four(model, lambda m: m[0](correlated()))
    assert (zeros.weights, zeros.by_magnitude) == (["0.weight", "1.weight"], ["1.weight"])
    assert sparsify.report_lines(zeros) == [
        "2:4 in 2 weights, 1 of them by magnitude",
        "2 stays dense: 12 x 16; 2:4 requires a multiple of 8 x a multiple of 16",
    ]


@pytest.mark.parametrize("frozen", ["transformer", "visual"])
def test_frozen_weights_stay_unchanged(frozen):
    model = new_model(tiny_architecture(layers=1), 0).module
    getattr(model, frozen).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in getattr(model, frozen).state_dict().items()}
    pixels, ids = torch.randn(4, 3, 32, 32), torch.randint(1, 400, (4, 24))
    zero_two_of_four(model, lambda m: (m.encode_image(pixels), m.encode_text(ids)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in getattr(model, frozen).state_dict().items())
