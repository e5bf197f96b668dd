"""MobileCLIP in Apple's own naming, trained and folded, written here in that layout: the same embeddings as open_clip's and timm's."""

import re

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model

from clipress.artifact import save_artifact
from clipress.errors import ArtifactError, RecipeError
from clipress.export.settings import OnnxSettings
from clipress.export.torch_export import export_graph
from clipress.models.importers import detected, import_checkpoint
from clipress.models.load import artifact_from_model, model_from_open_clip, save_for_open_clip
from clipress.models.mobileclip import name_from_shapes
from clipress.models.surgery import stock_weights
from clipress.runtime.onnx_session import run_from_onnx
from clipress.studies.small_models import registered, small_towers, stir
from clipress.tasks import graphs_of, model_from_artifact

PIXELS = {"MobileCLIP-S1": 96, "MobileCLIP-S2": 96, "MobileCLIP-B": 48}
# From timm's names of a FastViT to Apple's; network 1, 3 and 5 halve the image, 6 adds positions.
TOWER = [
    ("stem.", "patch_embed."),
    ("conv_kxk", "rbr_conv"),
    ("conv_scale", "rbr_scale"),
    ("identity", "rbr_skip"),
    (r"final_conv\.se\.fc1", "conv_exp.se.reduce"),
    (r"final_conv\.se\.fc2", "conv_exp.se.expand"),
    ("final_conv", "conv_exp"),
    ("large_conv", "lkb_origin"),
    ("mlp", "convffn"),
    (r"(layer_scale\w*)\.gamma", r"\1"),
    (r"downsample\.proj\.0\.reparam_conv", "downsample.proj.0.lkb_reparam"),
    (r"stages\.3\.pos_emb\.pos_enc", "network.6.pe"),
    (r"stages\.3\.pos_emb", "network.6"),
    (r"stages\.3\.blocks", "network.7"),
    *((rf"stages\.{stage}\.blocks", f"network.{2 * stage}") for stage in range(3)),
    *((rf"stages\.{stage}\.downsample", f"network.{2 * stage - 1}") for stage in range(1, 4)),
]
# Of a ViT, and of any text tower.
PLAIN = [
    (r"patch_embed\.backbone\.(\d)\.conv", r"patch_emb.\1.block.conv"),
    (r"patch_embed\.backbone\.(\d)\.bn", r"patch_emb.\1.block.norm"),
    (r"^norm\.", "post_transformer_norm."),
    (r"\.norm1\.", ".pre_norm_mha.0."),
    (r"\.norm2\.", ".pre_norm_ffn.0."),
    (r"\.attn\.qkv", ".pre_norm_mha.1.qkv_proj"),
    (r"\.attn\.proj", ".pre_norm_mha.1.out_proj"),
    (r"\.mlp\.fc1", ".pre_norm_ffn.1"),
    (r"\.mlp\.fc2", ".pre_norm_ffn.4"),
    (r"^blocks\.", "transformer."),
    (r"^pos_embed$", "pos_embed.pos_embed.pos_embed"),
]
TEXT = [
    (r"resblocks\.", ""),
    (r"\.ln_1\.", ".pre_norm_mha.0."),
    (r"\.ln_2\.", ".pre_norm_ffn.0."),
    (r"\.attn\.in_proj_", ".pre_norm_mha.1.qkv_proj."),
    (r"\.attn\.out_proj", ".pre_norm_mha.1.out_proj"),
    (r"\.mlp\.c_fc", ".pre_norm_ffn.1"),
    (r"\.mlp\.c_proj", ".pre_norm_ffn.4"),
    ("ln_final", "final_layer_norm"),
    ("token_embedding", "embedding_layer"),
    ("text_projection", "projection_layer"),
    ("^positional_embedding", "positional_embedding.pos_embed.pos_embed"),
]


def apples(module, is_plain):
    """Return an open_clip MobileCLIP's weights as Apple's file has them."""
    found, head = {}, "classifier.proj" if is_plain else "head.proj"
    for name, tensor in stock_weights(module).items():
        if name.startswith("visual.trunk."):
            inside = name.removeprefix("visual.trunk.")
            if inside.startswith("head."):
                if inside.endswith("weight"):
                    found[f"image_encoder.model.{head}"] = tensor.T
                continue
            for old, new in PLAIN if is_plain else TOWER:
                inside = re.sub(old, new, inside)
            is_table = inside.startswith("pos_embed.")
            found[f"image_encoder.model.{inside}"] = tensor[None] if is_table else tensor
        elif name.startswith("text."):
            inside = name.removeprefix("text.")
            for old, new in TEXT:
                inside = re.sub(old, new, inside)
            found[f"text_encoder.{inside}"] = tensor[None, None] if inside.startswith("positional") else tensor
        else:
            found[name] = tensor
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.fixture(params=PIXELS)
def small(request, tmp_path):
    """The name of a small MobileCLIP, which kind it is, and a model of it with Apple's head, which has no bias."""
    kind, name = request.param, registered(request.param, tmp_path)
    with small_towers(PIXELS[kind]):
        model = model_from_open_clip(name, "random").module.eval()
        stir(model)
        trunk = model.visual.trunk
        (trunk.head if kind == "MobileCLIP-B" else trunk.head.fc).bias.data.zero_()
        yield name, kind, model


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, PIXELS[kind], PIXELS[kind], generator=generator)
    ids = torch.randint(1, 700, (2, 77), generator=generator)
    ids[range(2), [9, 76]] = 767
    return pixels, ids


@torch.no_grad()
def embedded(module, kind, shifted=False):
    pixels, ids = inputs(kind)
    # A kernel of 4 that moves by 4 and pads by 1 is one without padding on the image moved by one pixel.
    pixels = F.pad(pixels, (1, 0, 1, 0))[..., :-1, :-1] if shifted else pixels
    return module.encode_image(pixels), module.encode_text(ids)


def assert_same(model, wanted, kind):
    for found, rows in zip(embedded(model.module, kind), wanted, strict=True):
        torch.testing.assert_close(found, rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
def test_apples_file_gives_the_embeddings_of_its_model_trained_or_folded(small, folded, tmp_path):
    name, kind, theirs = small
    is_plain = kind == "MobileCLIP-B"
    if is_plain:  # It has no branches to fold.
        for module in theirs.visual.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
    wanted = embedded(theirs, kind, shifted=is_plain)
    if folded:
        reparameterize_model(theirs.visual.trunk, inplace=True)
    state = apples(theirs, is_plain)
    assert detected(state) == "mobileclip"
    assert any("reparam" in name for name in state) == (folded and not is_plain)
    torch.save(state, tmp_path / "apple.pt")
    imported = import_checkpoint(tmp_path / "apple.pt", model=name)
    assert_same(imported, wanted, kind)
    assert_same(model_from_open_clip(name, str(tmp_path / "apple.pt")), wanted, kind)
    folder = save_artifact(artifact_from_model(imported, ({"stage": "a", "hash": "a"},), {}), tmp_path / "a")
    for found, rows in zip(*(embedded(m.module, kind) for m in (model_from_artifact(folder), imported)), strict=True):
        assert torch.equal(found, rows)
    assert save_for_open_clip(imported, tmp_path / "hub") == (not folded and not is_plain)


@pytest.mark.parametrize("small", ["MobileCLIP-S1"], indirect=True)
def test_a_folded_tower_in_open_clips_naming_is_read_and_exported(small, tmp_path):
    name, kind, theirs = small
    wanted = embedded(theirs, kind)
    reparameterize_model(theirs.visual.trunk, inplace=True)
    torch.save(stock_weights(theirs), tmp_path / "folded.pt")
    model = import_checkpoint(tmp_path / "folded.pt", model=name)
    assert_same(model, wanted, kind)
    export_graph(model, graphs_of(model)["image"], tmp_path / "image.onnx", OnnxSettings())
    found = run_from_onnx(tmp_path / "image.onnx")({"pixel_values": inputs(kind)[0].numpy()})["image_embeds"]
    torch.testing.assert_close(torch.from_numpy(found), F.normalize(wanted[0], dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("small", ["MobileCLIP-S1"], indirect=True)
def test_a_file_that_is_incomplete_or_of_no_known_name_is_one_message(small, tmp_path):
    name, _, theirs = small
    state = apples(theirs, False)
    torch.save(state, tmp_path / "apple.pt")
    with pytest.raises(ArtifactError, match=r"none of MobileCLIP-S1, S2 and B\. Pass its open_clip model name"):
        import_checkpoint(tmp_path / "apple.pt")
    with pytest.raises(RecipeError, match="open_clip has no model 'MobileCLIP-S9'"):
        import_checkpoint(tmp_path / "apple.pt", model="MobileCLIP-S9")
    del state["text_encoder.final_layer_norm.bias"]
    torch.save(state, tmp_path / "apple.pt")
    with pytest.raises(ArtifactError, match=r"tensor text\.ln_final\.bias is missing"):
        import_checkpoint(tmp_path / "apple.pt", model=name)


def of_shapes(stem, blocks, **more):
    zero = torch.zeros(1)
    names = [f"image_encoder.model.network.{2 * (i % 4)}.{i // 4}.layer_scale" for i in range(blocks)]
    return {
        **dict.fromkeys(names, zero),
        f"image_encoder.model.patch_embed.0.{stem[0]}.weight": zero.expand(stem[1]),
        **more,
    }


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (of_shapes(("rbr_conv.0.conv", 64), 40), "MobileCLIP-S1"),
        (of_shapes(("reparam_conv", 64), 40), "MobileCLIP-S1"),
        (of_shapes(("reparam_conv", 80), 44), "MobileCLIP-S2"),
        ({"image_encoder.model.patch_emb.0.block.conv.weight": torch.zeros(1)}, "MobileCLIP-B"),
    ],
)
def test_shapes_tell_which_mobileclip_it_is(state, name):
    assert name_from_shapes(state) == name


def test_s0_is_refused_since_open_clip_has_no_such_text_tower():
    state = of_shapes(
        ("reparam_conv", 64), 20, **{"text_encoder.transformer.0.token_mixer.layer_scale": torch.zeros(1)}
    )
    with pytest.raises(ArtifactError, match="it is a MobileCLIP-S0, whose text tower mixes convolutions and attention"):
        name_from_shapes(state)
