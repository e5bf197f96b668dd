"""Files of DeiT and of UPop's compressed DeiTs compute what their own code does."""

import pytest
import torch
import torch.nn.functional as F
from helpers import clipress
from timm.models.vision_transformer import VisionTransformer

from clipress.artifact import load_artifact
from clipress.errors import ArtifactError, RecipeError
from clipress.models import surgery
from clipress.models.importers import detected, import_checkpoint
from clipress.models.weights_file import weights_from_file
from clipress.tasks import model_from_artifact, task_named

WIDTH, HEADS, LAYERS, SIZE = 128, 2, 2, 32


def timms(classes=5):
    torch.manual_seed(0)
    model = VisionTransformer(SIZE, 16, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=classes).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def pixels():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def slim_state(dims, hidden):
    """Return UPop's form of a file: of every layer its own number of dims per head, and of hidden units."""
    state = timms().state_dict()
    rng = torch.Generator().manual_seed(2)
    for layer, (dim, units) in enumerate(zip(dims, hidden, strict=True)):
        at = f"blocks.{layer}."
        shapes = {
            "attn.qkv.weight": (3 * HEADS * dim, WIDTH),
            "attn.qkv.bias": (3 * HEADS * dim,),
            "attn.proj.weight": (WIDTH, HEADS * dim),
            "mlp.fc1.weight": (units, WIDTH),
            "mlp.fc1.bias": (units,),
            "mlp.fc2.weight": (WIDTH, units),
        }
        for name, shape in shapes.items():
            state[at + name] = torch.randn(shape, generator=rng) * 0.05
    return state


def as_upop_computes(state, images):
    """Compute a slim ViT as UPop's code does, whose softmax scale stays 64 ** -0.5."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"blocks.{layer}."): t for name, t in state.items() if name.startswith(f"blocks.{layer}.")
        }
        y = F.layer_norm(x, (WIDTH,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        qkv = F.linear(y, own["attn.qkv.weight"], own["attn.qkv.bias"])
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) * 64**-0.5).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), own["attn.proj.weight"], own["attn.proj.bias"])
        y = F.layer_norm(x, (WIDTH,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        x = x + F.linear(y, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    x = F.layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)
    return F.linear(x[:, 0], state["head.weight"], state["head.bias"])


def logits(model):
    with torch.no_grad():
        return model.module(pixels())


def test_a_published_file_computes_what_timm_does(tmp_path):
    reference = timms()
    torch.save({"model": reference.state_dict()}, tmp_path / "deit.pth")  # as they are published
    model = import_checkpoint(tmp_path / "deit.pth")
    with torch.no_grad():
        torch.testing.assert_close(logits(model), reference(pixels()), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            logits(model), as_upop_computes(reference.state_dict(), pixels()), atol=1e-5, rtol=1e-5
        )
    assert model.task == "classification" and model.architecture["labels"] == ["0", "1", "2", "3", "4"]
    assert (model.preprocess.size, model.preprocess.crop_pct) == (SIZE, 0.875)


def test_a_compressed_file_keeps_the_scale_that_it_was_trained_with(tmp_path):
    state = slim_state(dims=(40, 7), hidden=(300, 1))
    torch.save({"model": state}, tmp_path / "slim.pth")
    model = import_checkpoint(tmp_path / "slim.pth")
    torch.testing.assert_close(logits(model), as_upop_computes(state, pixels()), atol=1e-5, rtol=1e-5)
    shapes = surgery.shapes(model.module)
    assert [(one["qk_dim"], one["ffn"], one["scale"]) for one in shapes.values()] == [(40, 300, 0.125), (7, 1, 0.125)]


def test_a_search_s_masks_are_left_out(tmp_path):
    state = timms().state_dict()
    masks = {"blocks.0.attn.alpha": torch.ones(1, 1, 1, 1, 64), "blocks.0.mlp.alpha": torch.ones(1, 1, 512)}
    torch.save({"model": {**state, **masks}}, tmp_path / "search.pth")
    assert detected(weights_from_file(tmp_path / "search.pth", None).state) == "deit"
    with torch.no_grad():
        torch.testing.assert_close(
            logits(import_checkpoint(tmp_path / "search.pth")), timms()(pixels()), atol=1e-5, rtol=1e-5
        )


def test_an_imported_file_is_an_artifact_with_imagenet_s_names(tmp_path):
    torch.save({"model": timms(1000).state_dict()}, tmp_path / "deit.pth")
    done = clipress("import", tmp_path / "deit.pth", tmp_path / "artifact")
    assert done.exit_code == 0, done.output
    assert ": deit (entry model), " in done.output and "classes: 1,000, tench, goldfish, " in done.output
    assert (
        "preprocessing, DeiT's, since the file does not say: 32 pixels, bicubic, shortest, crop_pct 0.875;"
        in done.output
    )
    artifact = load_artifact(tmp_path / "artifact")
    assert artifact.task == "classification" and artifact.tokenizer is None
    with torch.no_grad():
        torch.testing.assert_close(logits(model_from_artifact(artifact)), timms(1000)(pixels()), atol=1e-5, rtol=1e-5)
    assert task_named("classification").graphs(model_from_artifact(artifact))["image"].outputs[0].shape == (1000,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dist_token": torch.zeros(1, 1, WIDTH)}, "a distilled DeiT, with a second token and head"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(100, WIDTH)}, "rows of q, k and v for 2 equal heads, found 100 rows"),
        ({"pos_embed": torch.zeros(1, 7, WIDTH)}, "pos_embed: expected a square number of positions plus one, found 7"),
        ({"extra": torch.zeros(1)}, "1 tensors have no place in its architecture: extra"),
        ({"norm.bias": torch.full((WIDTH,), torch.nan)}, "norm.bias has values that are not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    torch.save({"model": {**timms().state_dict(), **change}}, tmp_path / "deit.pth")
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(tmp_path / "deit.pth")


def test_a_model_name_is_refused(tmp_path):
    torch.save(timms().state_dict(), tmp_path / "deit.pth")
    with pytest.raises(RecipeError, match="the shapes determine the architecture"):
        import_checkpoint(tmp_path / "deit.pth", model="deit_small_patch16_224")
