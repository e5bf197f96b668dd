"""Calibration: its samples, the scales it sets, and the data it rejects."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipress.compress import quantize
from clipress.compress.calibration import StoredSamples
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.quantize import Quantize
from clipress.compress.settings import Runtime
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import ArtifactError, DataError, RecipeError
from clipress.models import quantizers
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.recipe import checked

ONLY = "visual.transformer.resblocks.0.mlp.c_fc"
OTHERS = ("visual.conv1", "*attn*", "*c_proj", "transformer.*")


@pytest.fixture(scope="module")
def fabric():
    return start_fabric(Runtime(accelerator="cpu"))


@pytest.fixture
def digits(fabric):
    return Context(fabric, DataSpec(train=(SourceSpec(format="digits", limit=40),)), 0, title="int8")


def settings(**given):
    return Quantize(**{"steps": 0, "calibrate": 16, "batch_size": 8, **given})


class Heavy(nn.Module):
    """One Linear; its input has outliers a hundred times larger than its other values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x)


def heavy_tailed():
    x = torch.randn(64, 512, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0, :2] *= 100
    x[0, 0, 0] = 500  # The first batch has the widest range, since histograms grow by full bins.
    return x


def scale_of(method, percentile=99.9):
    x = heavy_tailed()

    def show(model):
        for part in x.split(16):
            model(part)

    model = quantizers.attach(Heavy(), ["linear"], show, method, percentile)
    return float(model.linear.input_quantizer.amax), x.abs().flatten().double().numpy()


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile_is_that_of_the_absolute_activations_within_a_bin(percentile):
    scale, seen = scale_of("percentile", percentile)
    assert scale == pytest.approx(np.percentile(seen, percentile), abs=1.01 * seen.max() / 2048)


def test_max_is_the_largest_absolute_activation():
    scale, seen = scale_of("max")
    assert scale == pytest.approx(seen.max(), rel=1e-6)


def test_entropy_cuts_off_a_heavy_tail():
    scale, seen = scale_of("entropy")
    assert 0 < scale < 0.5 * seen.max()


def test_weight_scales_do_not_depend_on_the_method():
    weights = []
    for method in ("max", "percentile", "entropy"):
        torch.manual_seed(0)
        model = quantizers.attach(Heavy(), ["linear"], lambda m: m(heavy_tailed()[:4]), method)
        largest = model.linear.weight.abs().amax(1)
        assert torch.equal(model.linear.weight_quantizer.amax.flatten(), largest * (127 / 64))  # this value becomes 64
        weights.append(model.linear(torch.ones(1, 16)))
    assert not torch.equal(weights[0], weights[1])  # the activation scale depends on the method


def test_a_smaller_scale_clips_what_is_larger():
    model = quantizers.attach(Heavy(), ["linear"], lambda m: m(heavy_tailed()), "percentile", 99.0)
    scale = float(model.linear.input_quantizer.amax)
    assert torch.equal(model(torch.full((1, 16), 2 * scale)), model(torch.full((1, 16), 4 * scale)))


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_the_stage_calibrates_on_the_training_images(digits, method):
    model, details = quantize.run(
        settings(method=method, exclude=OTHERS), new_model(tiny_architecture(layers=1), 0), digits
    )
    assert model.quantization["modules"] == [ONLY] and details["quantized_modules"] == 1
    assert model.quantization["method"] == method
    assert float(dict(model.module.named_modules())[ONLY].input_quantizer.amax) > 0


@pytest.mark.parametrize("given", [{"method": "minmax"}, {"percentile": 101}, {"percentile": 0.999}])
def test_methods_and_percentiles_are_validated_in_the_settings(given):
    with pytest.raises(RecipeError, match=next(iter(given))):
        checked(Quantize, {"steps": 0, **given}, "stages.0.quantize")


def folder_of(colours, path):
    for number, colour in enumerate(colours):
        (path / "one").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(path / "one" / f"{number}.png")
    return SourceSpec(format="folder", images=path)


def test_calibration_on_identical_images_is_rejected(fabric, tmp_path):
    source = folder_of([(9, 90, 200)] * 8, tmp_path)
    context = Context(fabric, DataSpec(train=(source,)), 0, title="int8")
    with pytest.raises(DataError, match="found 16 identical ones"):
        quantize.run(settings(), new_model(tiny_architecture(layers=1), 0), context)


def test_calibration_without_data_is_rejected(fabric, tmp_path):
    (tmp_path / "one").mkdir()
    context = Context(fabric, DataSpec(train=(SourceSpec(format="folder", images=tmp_path),)), 0, title="int8")
    with pytest.raises(DataError, match="no usable records") as error:
        quantize.run(settings(), new_model(tiny_architecture(layers=1), 0), context)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_named(digits):
    model = new_model(tiny_architecture(layers=1), 0)
    model.module.visual.conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ArtifactError, match=r"not finite: visual\.conv1\.weight\.") as error:
        quantize.run(settings(), model, digits)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("method", ["max", "percentile", "entropy"])
def test_a_module_that_sees_only_zeros_is_named(method):
    with pytest.raises(RecipeError, match=r"only zeros.* linear"):
        quantizers.attach(Heavy(), ["linear"], lambda m: m(torch.zeros(4, 16)), method)


def test_a_module_that_is_never_reached_is_named():
    for method in ("max", "percentile"):
        with pytest.raises(RecipeError, match="did not reach linear"):
            quantizers.attach(Heavy(), ["linear"], lambda m: None, method)


def test_layers_that_no_graph_runs_stay_in_full_precision(digits):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    model = new_model({**tiny_architecture(layers=1), "vision_cfg": vision}, 0)
    quantized, details = quantize.run(settings(), model, digits)
    pool = [f"visual.attnpool.{name}_proj" for name in "kqvc"]  # read by a function that takes their weights
    assert details["not_reached"] == pool
    assert not set(pool) & set(quantized.quantization["modules"])
    assert "visual.layer1.0.conv1" in quantized.quantization["modules"]


def test_stored_samples_are_decoded_once_and_read_as_often_as_needed(tmp_path):
    made = []

    def batches():
        for number in range(3):
            made.append(number)
            yield {
                "text": {"input_ids": torch.arange(4).reshape(2, 2) + number},
                "image": {"x": torch.rand(2, 3).double()},
            }

    stored = StoredSamples(batches(), tmp_path, torch.device("cpu"))
    first, second = list(stored), list(stored)
    assert made == [0, 1, 2] and len(first) == 3
    assert first[1]["text"]["input_ids"].dtype == torch.int64 and first[1]["image"]["x"].dtype == torch.float32
    assert torch.equal(first[2]["text"]["input_ids"], torch.arange(4).reshape(2, 2) + 2)
    assert all(torch.equal(a["image"]["x"], b["image"]["x"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["image"]["x"], first[1]["image"]["x"])
