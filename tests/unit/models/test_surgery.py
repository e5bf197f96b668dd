"""Cutting equals masking, and an artifact restores its model."""

import open_clip
import pytest
import torch

from clipress.artifact import load_artifact, save_artifact
from clipress.models import anatomy, surgery
from clipress.models.load import artifact_from_model, build, new_model, save_for_open_clip
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact


def inputs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 400, (3, 24), generator=generator)
    ids[:, -1] = 49407
    return torch.randn(3, 3, 32, 32, generator=generator), ids


def outputs(model):
    pixels, ids = inputs()
    with torch.no_grad():
        return model.eval().encode_image(pixels), model.encode_text(ids)


def random_masks(block, seed):
    """Return masks for a block's attention and feed-forward."""
    generator = torch.Generator().manual_seed(seed)
    attn, ffn = block.parts
    h, d = attn.module.heads, attn.module.qk_dim
    qk_dim, v_dim = (int(torch.randint(1, d + 1, (), generator=generator)) for _ in range(2))

    def rows(count):
        order = torch.rand(h, d, generator=generator).argsort(1)
        return order < count  # Every head keeps `count` dims of its own.

    masks = surgery.AttnMask(rows(qk_dim), rows(v_dim))
    return masks, surgery.FfnMask(torch.rand(ffn.hidden, generator=generator) < 0.4)


def cut_block(block, masks):
    for part, mask in zip(block.parts, masks, strict=True):
        surgery.cut(part, mask)


@torch.no_grad()
def mask_by_hand(block, masks):
    """Zero the weights and biases of the cut units, which is equivalent to removing them."""
    (attn, ffn), (kept, kept_ffn) = block.parts, masks
    attn = attn.module
    pairs = ((attn.q, kept.qk), (attn.k, kept.qk), (attn.v, kept.v), (ffn.linear_in, kept_ffn.ffn))
    for linear, mask in pairs:
        linear.weight[~mask.flatten()] = 0
        linear.bias[~mask.flatten()] = 0


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_model_matches_the_masked_model(seed):
    masked = new_model(tiny_architecture(layers=2), seed).module
    for parameter in masked.parameters():  # Biases start at zero, so randomise them.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    cut = new_model(tiny_architecture(layers=2), seed).module
    cut.load_state_dict(masked.state_dict())
    for number, (a, b) in enumerate(zip(anatomy.blocks(masked), anatomy.blocks(cut), strict=True)):
        masks = random_masks(a, 10 * seed + number)
        mask_by_hand(a, masks)
        cut_block(b, masks)
    assert anatomy.counts(cut)["block_params"] < anatomy.counts(masked)["block_params"]
    for wanted, found in zip(outputs(masked), outputs(cut), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_attention_matches_open_clip(custom_text, quick_gelu):
    config = tiny_architecture() | {"quick_gelu": quick_gelu}
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    torch.manual_seed(0)
    stock = kind(**config)
    wanted = outputs(stock)
    own = surgery.use_own_attention(stock)
    assert not list(anatomy.stock_attentions(own))
    for a, b in zip(wanted, outputs(own), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


def test_the_softmax_scale_is_the_original_one_after_cutting():
    model = new_model(tiny_architecture(), 0).module
    part = anatomy.attentions(model)[0]
    surgery.cut(part, surgery.AttnMask(qk=torch.arange(16).expand(2, 16) < 4))
    assert part.module.qk_dim == 4 and part.module.v_dim == 16 and part.module.scale == 16**-0.5


def test_a_cut_artifact_is_read_back_with_bitwise_equal_outputs(tmp_path):
    model = new_model(tiny_architecture(), 1)
    for number, block in enumerate(anatomy.blocks(model.module)):
        cut_block(block, random_masks(block, number))
    save_artifact(artifact_from_model(model, (), {}), tmp_path / "a")
    again = model_from_artifact(load_artifact(tmp_path / "a"))
    for wanted, found in zip(outputs(model.module), outputs(again.module), strict=True):
        assert torch.equal(wanted, found)


def test_open_clip_loads_the_files_of_an_uncut_model(tmp_path):
    model = new_model(tiny_architecture(), 2)
    assert save_for_open_clip(model, tmp_path / "open_clip")
    stock = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}", require_pretrained=True)
    for wanted, found in zip(outputs(model.module), outputs(stock), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_cut_model_is_not_written_for_open_clip(tmp_path):
    model = new_model(tiny_architecture(), 2)
    block = anatomy.blocks(model.module)[0]
    cut_block(block, random_masks(block, 0))
    assert not save_for_open_clip(model, tmp_path / "open_clip")
    assert not (tmp_path / "open_clip").exists()


def test_embedding_counts_cover_the_embedding_tables_only():
    model = build(tiny_architecture(width=32))
    counted = anatomy.counts(model)
    # Token table, text positions, 16 patch positions and the class position, class embedding; all 32 wide.
    assert counted["params"] - counted["params_without_embeddings"] == 32 * (49408 + 24 + 17 + 1)


def timm_vit():
    """Return a CLIP whose image tower is a plain timm vision transformer."""
    vision = {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "linear",
    }
    config = tiny_architecture() | {"vision_cfg": vision | {"image_size": 160}}
    return config | {"custom_text": True}


def test_timm_vision_transformers_are_cut_and_read_back(tmp_path):
    config = timm_vit()
    torch.manual_seed(0)
    stock = open_clip.model.CustomTextCLIP(
        **{key: value for key, value in config.items() if key != "custom_text"}
    ).eval()
    pixels, ids = torch.randn(2, 3, 160, 160), inputs()[1]
    with torch.no_grad():
        wanted = stock.encode_image(pixels), stock.encode_text(ids)
    names = dict(stock.state_dict())
    own = surgery.use_own_attention(stock)
    assert {block.tower for block in anatomy.blocks(own)} == {"image", "text"}
    with torch.no_grad():
        for a, b in zip(wanted, (own.encode_image(pixels), own.encode_text(ids)), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    again = surgery.stock_weights(own)
    assert again.keys() == names.keys() and all(torch.equal(again[name], names[name]) for name in names)

    model = new_model(config, 0)
    masked = new_model(config, 0).module.eval()
    for number, (a, b) in enumerate(zip(anatomy.blocks(masked), anatomy.blocks(model.module), strict=True)):
        masks = random_masks(a, number)
        mask_by_hand(a, masks)
        cut_block(b, masks)
    save_artifact(artifact_from_model(model, (), {}), tmp_path / "a")
    read = model_from_artifact(tmp_path / "a").module
    with torch.no_grad():
        torch.testing.assert_close(read.encode_image(pixels), masked.encode_image(pixels), atol=1e-5, rtol=1e-5)
        assert torch.equal(read.encode_image(pixels), model.module.eval().encode_image(pixels))


@pytest.mark.parametrize("timm", [None, "test_vit"])
def test_stock_names_go_both_ways(timm):
    architecture = tiny_architecture()
    if timm:
        architecture["vision_cfg"] = {"timm_model_name": timm, "timm_proj": "linear", "image_size": 160}
    model = build(architecture, 0)
    stock = surgery.stock_weights(model)
    assert not [name for name in stock if ".attn.q." in name]
    own = surgery.own_weights(model, stock)
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
