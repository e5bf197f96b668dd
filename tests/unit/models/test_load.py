"""Loading by name and from checkpoints in open_clip's formats, valid and broken."""

import open_clip
import pytest
import torch

from clipress.artifact import load_artifact, save_artifact
from clipress.errors import ArtifactError, RecipeError
from clipress.models.load import TeacherSpec, artifact_from_model, model_from_open_clip, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact


@pytest.fixture
def tiny_name(tmp_path):
    """Register the tiny config with open_clip, as a user's own model config would be."""
    import json

    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(tiny_architecture()))
    open_clip.add_model_config(tmp_path / "tiny-for-tests.json")
    return "tiny-for-tests"


def test_a_checkpoint_file_gives_the_same_embeddings_as_open_clip(tiny_name, tmp_path):
    torch.manual_seed(3)
    stock = open_clip.create_model(tiny_name).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in stock.state_dict().items()}}, tmp_path / "epoch_1.pt")
    model = model_from_open_clip(tiny_name, str(tmp_path / "epoch_1.pt"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.module.encode_image(pixels), stock.encode_image(pixels), atol=1e-5, rtol=1e-5)
    assert model.preprocess.size == 32 and model.tokenizer["context_length"] == 24


def test_a_truncated_checkpoint_is_reported(tiny_name, tmp_path):
    path = tmp_path / "cut.pt"
    torch.save(open_clip.create_model(tiny_name).state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=r"cut\.pt.*cannot be read.*truncated"):
        model_from_open_clip(tiny_name, str(path))


def test_a_missing_checkpoint_is_reported(tiny_name):
    with pytest.raises(ArtifactError, match=r"nowhere\.pt.*neither a file nor a pretrained tag"):
        model_from_open_clip(tiny_name, "nowhere.pt")


def test_an_unknown_model_name_is_reported():
    with pytest.raises(RecipeError, match="Did you mean 'ViT-B-32'"):
        model_from_open_clip("ViT-B-3", "random")


def test_random_weights_must_be_requested(tiny_name):
    with pytest.raises(RecipeError, match="needs a checkpoint"):
        model_from_open_clip(tiny_name, None)


@pytest.mark.parametrize("given", [{}, {"artifact": "a", "model": "b"}])
def test_a_teacher_has_exactly_one_source(given):
    with pytest.raises(RecipeError, match="exactly one of artifact, model, recipe"):
        TeacherSpec(**given)


@pytest.fixture
def saved(tmp_path):
    return save_artifact(artifact_from_model(new_model(tiny_architecture(), 0), (), {}), tmp_path / "artifact")


def test_truncated_weights_are_reported(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated or changed"):
        load_artifact(saved)


def test_missing_weights_are_reported(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "schema_version None"),
        ('{"schema_version": 99}', "99"),
        ('{"schema_version": 1}', "lacks"),
    ],
)
def test_a_damaged_header_is_reported(saved, text, message):
    (saved / "clipress.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved)


def test_shapes_that_do_not_fit_the_weights_are_reported(saved):
    import json

    header = json.loads((saved / "clipress.json").read_text())
    next(iter(header["shapes"].values()))["ffn"] = 96
    (saved / "clipress.json").write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match="do not fit its own shapes"):
        model_from_artifact(saved)


def test_a_failed_write_keeps_the_previous_artifact(saved, monkeypatch):
    before = (saved / "clipress.json").read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ArtifactError, match="could not be written"):
        save_artifact(artifact_from_model(new_model(tiny_architecture(), 5), (), {}), saved)
    assert (saved / "clipress.json").read_text() == before
    assert load_artifact(saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
