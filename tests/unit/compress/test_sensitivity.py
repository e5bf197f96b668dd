"""INT8 sensitivity of layers, and the layers left in full precision because of it."""

import pytest
import torch

from clipress.compress import quantize
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.quantize import Quantize
from clipress.compress.sensitivity import keep_sensitive, sensitivities
from clipress.compress.settings import Runtime
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import RecipeError
from clipress.models import quantizers
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact

DELICATE = "visual.transformer.resblocks.0.mlp.c_proj"


def with_an_outlier():
    """A CLIP in which hidden unit 0 of a feed-forward is huge but unused: it only affects rounding."""
    model = new_model(tiny_architecture(layers=1), 0)
    mlp = model.module.visual.transformer.resblocks[0].mlp
    with torch.no_grad():
        mlp.c_fc.bias[0] = 3000.0
        mlp.c_proj.weight[:, 0] = 0
    return model


@pytest.fixture(scope="module")
def digits():
    data = DataSpec(train=(SourceSpec(format="digits", limit=40),))
    return Context(start_fabric(Runtime(accelerator="cpu")), data, 0, title="int8")


@pytest.fixture(scope="module")
def calibrated():
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "image": {"pixel_values": torch.randn(8, 3, 32, 32, generator=generator)},
            "text": {"input_ids": torch.randint(1, 400, (8, 24), generator=generator)},
        }
        for _ in range(2)
    ]
    model = with_an_outlier()

    def show(module):
        with torch.no_grad():
            for one in samples:
                module.encode_image(one["image"]["pixel_values"]), module.encode_text(one["text"]["input_ids"])

    names = quantizers.quantizable(model.module)
    quantizers.attach(model.module.eval(), names, show)
    return model, names, samples


def cosine(model, samples):
    """Mean cosine to a model without quantizers, of the image tower."""
    plain = with_an_outlier().module.eval()
    pixels = torch.cat([one["image"]["pixel_values"] for one in samples])
    with torch.no_grad():
        return torch.cosine_similarity(model.module.encode_image(pixels), plain.encode_image(pixels)).mean().item()


def test_the_layer_with_the_outlier_is_the_most_sensitive(calibrated):
    model, names, samples = calibrated
    report = sensitivities(model, names, samples)
    assert sorted(layer.module for layer in report) == sorted(names)
    assert [layer.damage for layer in report] == sorted((layer.damage for layer in report), reverse=True)
    assert (report[0].module, report[0].tower) == (DELICATE, "image")
    assert report[0].damage > 10 * report[1].damage > 0
    assert {layer.tower for layer in report} == {"image", "text"}


def test_damage_is_one_minus_the_cosine_to_the_model_without_quantizers(calibrated):
    model, names, samples = calibrated
    report = {layer.module: layer.damage for layer in sensitivities(model, names, samples)}
    quantizers.only(model.module, names, [DELICATE])
    assert report[DELICATE] == pytest.approx(1 - cosine(model, samples), rel=1e-3)
    quantizers.only(model.module, names, [])
    assert cosine(model, samples) == pytest.approx(1, abs=1e-6)


def test_sensitive_layers_are_excluded_until_the_damage_is_under_the_limit(calibrated):
    model, names, samples = calibrated
    report = sensitivities(model, names, samples)
    kept, damage = keep_sensitive(model, report, samples, limit=report[0].damage / 2)
    assert kept == [DELICATE]
    quantizers.only(model.module, names, [name for name in names if name not in kept])
    assert (
        damage["image"] == pytest.approx(1 - cosine(model, samples), abs=1e-7)
        and damage["image"] <= report[0].damage / 2
    )
    more, less = keep_sensitive(model, report, samples, limit=damage["image"] / 2)
    assert more[0] == DELICATE and len(more) > 1 and max(less.values()) <= damage["image"] / 2


def test_nothing_is_excluded_under_a_loose_limit(calibrated):
    model, names, samples = calibrated
    assert keep_sensitive(model, sensitivities(model, names, samples), samples, limit=1.9)[0] == []


def test_a_limit_that_no_layer_can_meet_is_reported(calibrated):
    model, names, samples = calibrated
    report = sensitivities(model, names, samples)
    with pytest.raises(RecipeError, match=r"max_damage: 1e-12 .*leaves no module in INT8"):
        keep_sensitive(model, report, samples, limit=1e-12)


def settings(**given):
    return Quantize(**{"steps": 0, "calibrate": 16, "batch_size": 8, **given})


def test_exclude_auto_excludes_the_sensitive_layer_and_records_it(digits):
    model, details = quantize.run(settings(exclude="auto", max_damage=0.002), with_an_outlier(), digits)
    assert details["kept"] == [DELICATE] and DELICATE not in model.quantization["modules"]
    assert details["sensitivity"][0]["module"] == DELICATE and len(details["sensitivity"]) == 13
    assert max(details["damage"].values()) <= 0.002 and details["quantized_modules"] == 12
    modules = dict(model.module.named_modules())
    rounding = {name for name in modules if name.endswith("_quantizer") and modules[name].is_enabled}
    assert rounding == {
        f"{name}.{part}_quantizer" for name in model.quantization["modules"] for part in ("input", "weight")
    }


def test_an_excluded_layer_is_saved_and_loaded_as_a_plain_layer(digits):
    model, _ = quantize.run(settings(exclude=("auto", "*.attn.*"), max_damage=0.002), with_an_outlier(), digits)
    artifact = artifact_from_model(model, ({"stage": "int8", "hash": "x"},), {})
    assert f"{DELICATE}.weight" in artifact.weights and f"{DELICATE}.input_quantizer._amax" not in artifact.weights
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    again = model_from_artifact(artifact)
    with torch.no_grad():
        assert torch.equal(again.module.encode_image(pixels), model.module.eval().encode_image(pixels))


def test_the_report_is_available_without_excluding_anything(digits):
    model, details = quantize.run(settings(sensitivity=True), with_an_outlier(), digits)
    assert len(details["sensitivity"]) == 13 == len(model.quantization["modules"]) and "kept" not in details
    modules = dict(model.module.named_modules())
    assert all(modules[name].input_quantizer.is_enabled for name in model.quantization["modules"])


def test_training_runs_with_excluded_layers(digits):
    model, details = quantize.run(
        settings(exclude="auto", max_damage=0.002, steps=2, losses=["contrastive"]), with_an_outlier(), digits
    )
    assert details["steps"] == 2 and DELICATE in details["kept"]
    assert not dict(model.module.named_modules())[DELICATE].input_quantizer.is_enabled


def test_no_report_by_default(digits):
    _, details = quantize.run(settings(), with_an_outlier(), digits)
    assert details == {"quantized_modules": 13, "steps": 0}
