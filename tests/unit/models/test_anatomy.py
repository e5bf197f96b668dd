"""Parts and towers of a CLIP, a CLIP with a timm tower and a classifier; cross-attention."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipress.errors import ArtifactError
from clipress.models import anatomy, quantizers, surgery
from clipress.models.attention import Attention
from clipress.models.load import build
from clipress.models.tiny import tiny_architecture

CLASSES, SIDE = 7, 32


def stock_classifier(**changes):
    """Return timm's plain vision transformer with a head and random biases and gains."""
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES} | changes
    model = timm.models.VisionTransformer(img_size=SIDE, **shape)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.4, 0.4)
    return model.eval()


def classifier(**changes):
    return surgery.use_own_attention(stock_classifier(**changes))


def pixels(batch=2):
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model):
    return model(pixels())


def clip_with_timm_tower():
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": SIDE}
    return build(tiny_architecture(layers=1) | {"vision_cfg": vision, "custom_text": True}, 0)


def test_attention_matches_timm_and_keeps_its_parameter_names():
    stock = stock_classifier()
    wanted, names = outputs(stock), dict(stock.state_dict())
    model = surgery.use_own_attention(stock)
    assert not list(anatomy.stock_attentions(model))
    torch.testing.assert_close(outputs(model), wanted, atol=1e-5, rtol=1e-5)
    again = surgery.stock_weights(model)
    assert again.keys() == names.keys() and all(torch.equal(again[name], names[name]) for name in names)


def test_a_classifier_is_a_single_tower():
    model = classifier()
    assert anatomy.towers(model) == ("image",)
    assert {anatomy.tower_of(model, name) for name, _ in model.named_parameters()} == {"image"}
    assert len(anatomy.tower_parameters(model, "image")) == len(list(model.parameters()))
    assert [block.name for block in anatomy.blocks(model)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [part.name for part in anatomy.parts(model)][:2] == ["blocks.0.attn", "blocks.0.mlp"]
    assert anatomy.image_size(model) == (SIDE, SIDE)
    assert anatomy.token_layer(model, "image") is model.blocks[2]
    assert anatomy.token_shape(model, "image") == (17, 48)
    with pytest.raises(ArtifactError, match="no transformer blocks"):
        anatomy.token_layer(model, "text")


def test_parameter_counts_of_a_classifier_match_arithmetic():
    d, patches = 48, 16
    block = 4 * d + (4 * d * d + 4 * d) + (8 * d * d + 5 * d)  # Norms, attention, feed-forward.
    ends = 3 * 64 * d + d + 2 * d + d * CLASSES + CLASSES  # Patches, norm, head.
    embeddings = d + (patches + 1) * d  # Class token and positions.
    assert anatomy.counts(classifier()) == {
        "params": 3 * block + ends + embeddings,
        "params_without_embeddings": 3 * block + ends,
        "block_params": 3 * block,
    }
    assert anatomy.embedding_parameters(classifier()) == embeddings


def test_int8_reaches_patches_blocks_and_head_of_a_classifier():
    names = quantizers.quantizable(classifier())
    assert names[0] == "patch_embed.proj" and names[-1] == "head" and len(names) == 2 + 3 * 6
    assert quantizers.quantizable(classifier(), ("head", "blocks.*")) == ["patch_embed.proj"]


@st.composite
def part_masks(draw):
    """Draw, for each of three blocks, the heads, query-key dims, value dims and hidden units to keep."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    masks = []
    for _ in range(3):
        heads, qk, v, hidden = (draw(st.integers(0, most)) for most in (3, 16, 16, 192))

        def rows(count):
            return torch.rand(3, 16, generator=generator).argsort(1) < count

        attn = surgery.AttnMask(rows(qk), rows(v), torch.rand(3, generator=generator).argsort() < heads)
        masks.append((attn, surgery.FfnMask(torch.rand(192, generator=generator).argsort() < hidden)))
    return masks


@torch.no_grad()
def mask_by_hand(part, mask):
    if isinstance(part, anatomy.Ffn):
        part.linear_out.weight[:, ~mask.ffn] = 0
        return
    gone = ~mask.heads | (mask.qk.sum(1) == 0)
    part.module.q.weight[~mask.qk.flatten()] = 0
    part.module.q.bias[~mask.qk.flatten()] = 0
    part.module.out.weight[:, (~mask.v | gone[:, None]).flatten()] = 0


@settings(max_examples=25, deadline=None)
@given(part_masks())
def test_a_cut_classifier_matches_the_masked_one_and_is_rebuilt_from_its_shapes(masks):
    masked, model = classifier(), classifier()
    for (number, block), twin in zip(enumerate(anatomy.blocks(masked)), anatomy.blocks(model), strict=True):
        for part, other, mask in zip(block.parts, twin.parts, masks[number], strict=True):
            mask_by_hand(part, mask)
            surgery.cut(other, mask)
    torch.testing.assert_close(outputs(model), outputs(masked), atol=1e-5, rtol=1e-5)
    again = surgery.reshape(classifier(), surgery.shapes(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again), outputs(model)) and surgery.shapes(again) == surgery.shapes(model)


@pytest.mark.parametrize("make", [lambda: build(tiny_architecture(layers=1), 0), clip_with_timm_tower, classifier])
def test_parts_name_their_modules_and_belong_to_a_tower_of_the_model(make):
    model = make()
    modules = dict(model.named_modules())
    for part in anatomy.parts(model):
        assert part.tower in anatomy.towers(model) and anatomy.tower_of(model, part.name) == part.tower
        assert part.block in modules and part.name.startswith(part.block)
        assert modules[part.name] is (part.module if isinstance(part, anatomy.Attn) else part.parent)
    assert len(anatomy.attentions(model)) == len(anatomy.ffns(model)) == len(anatomy.blocks(model))


def test_every_parameter_of_a_clip_belongs_to_at_most_one_tower():
    model = build(tiny_architecture(layers=1), 0)
    assert anatomy.towers(model) == ("image", "text")
    assert anatomy.tower_of(model, "logit_scale") is None
    assert anatomy.tower_of(model, "visual.proj") == "image"
    assert anatomy.tower_of(model, "token_embedding.weight") == "text"


def test_a_model_without_plain_blocks_is_refused():
    with pytest.raises(ArtifactError, match=r"Sequential: expected transformer blocks.*found none"):
        anatomy.blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ArtifactError, match="found none"):
        surgery.use_own_attention(stock_classifier(qk_norm=True))


# records of shapes


def cut_tiny():
    model = build(tiny_architecture(layers=2), 0)
    attn, ffn = anatomy.blocks(model)[1].parts
    surgery.cut(attn, surgery.AttnMask(qk=torch.arange(16).expand(2, 16) < 4, heads=torch.tensor([True, False])))
    surgery.cut(ffn, surgery.FfnMask(torch.arange(128) < 40))
    return model


def test_shape_records_are_flat_as_in_version_1_artifacts():
    assert surgery.shapes(cut_tiny())["visual.transformer.resblocks.1"] == {
        "heads": 1,
        "qk_dim": 4,
        "v_dim": 16,
        "scale": 0.25,
        "ffn": 40,
    }


@pytest.mark.parametrize("per_part", [False, True])
def test_flat_records_and_records_per_part_are_both_read(per_part):
    model = cut_tiny()
    record = {part.name: part.shape for part in anatomy.parts(model)} if per_part else surgery.shapes(model)
    again = surgery.reshape(build(tiny_architecture(layers=2), 1), record)
    again.load_state_dict(model.state_dict(), strict=True)
    assert surgery.shapes(again) == surgery.shapes(model)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels()), model.encode_image(pixels()))


def test_a_second_attention_in_a_block_has_its_own_record(monkeypatch):
    model = build(tiny_architecture(layers=1), 0)
    found = anatomy.parts(model)
    second = anatomy.Attn("image", f"{found[0].block}.cross", found[0].block, Attention(32, 2, 4, 8, 0.5), 17, 9)
    monkeypatch.setattr(surgery, "parts", lambda _: [*found, second])
    record = surgery.shapes(model)
    assert record[found[0].block] == found[0].shape | found[1].shape
    assert record[second.name] == {"heads": 2, "qk_dim": 4, "v_dim": 8, "scale": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": -1}, "make no sense"),
        ({"ffn": 1 << 21}, "make no sense"),
        ({"scale": float("nan")}, "make no sense"),
        ({"qk_dim": "many"}, "do not describe visual.transformer.resblocks.0.attn"),
        ({"ffn": None}, "do not describe visual.transformer.resblocks.0.mlp: expected ffn"),
        (None, "do not describe visual.transformer.resblocks.0.attn: expected heads.*found None"),
    ],
)
def test_impossible_records_are_refused(change, message):
    record = surgery.shapes(build(tiny_architecture(layers=1), 0))
    name = "visual.transformer.resblocks.0"
    record[name] = None if change is None else record[name] | change
    with pytest.raises(ArtifactError, match=message):
        surgery.reshape(build(tiny_architecture(layers=1), 0), record)


# cross-attention to a memory of another width and length


def reference_attention(attn, x, memory, mask=None):
    """Reference: head by head, in double precision."""
    out = attn.out.bias.double() if attn.out.bias is not None else 0
    x, memory = x.double(), memory.double()
    q, k, v = (
        F.linear(y, m.weight.double(), m.bias.double()) for y, m in ((x, attn.q), (memory, attn.k), (memory, attn.v))
    )
    for head in range(attn.heads):
        qk, vs = slice(head * attn.qk_dim, (head + 1) * attn.qk_dim), slice(head * attn.v_dim, (head + 1) * attn.v_dim)
        logits = q[..., qk] @ k[..., qk].transpose(1, 2) * attn.scale
        weights = (logits if mask is None else logits + mask).softmax(-1)
        out = out + weights @ v[..., vs] @ attn.out.weight.double()[:, vs].T
    return out.float()


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_matches_the_formula(masked):
    torch.manual_seed(0)
    attn = Attention(24, 3, 5, 7, scale=0.3, memory_width=40)
    x, memory = torch.randn(2, 6, 24), torch.randn(2, 9, 40)
    mask = torch.randn(2, 1, 1, 9) * 3 if masked else None
    wanted = reference_attention(attn, x, memory, None if mask is None else mask[:, 0])
    torch.testing.assert_close(attn.attend(x, mask, memory), wanted, atol=1e-5, rtol=1e-5)
    flat = None if mask is None else mask.expand(2, 3, 6, 9).reshape(6, 6, 9)  # One mask per sample and head.
    torch.testing.assert_close(attn.attend(x, flat, memory), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 0])
def test_cross_attention_is_cut_and_reshaped_like_self_attention(heads):
    torch.manual_seed(0)
    attn = Attention(24, 3, 5, 7, scale=0.3, memory_width=40)
    part = anatomy.Attn("answer", "cross", "layer", attn, 6, 9)
    x, memory = torch.randn(2, 6, 24), torch.randn(2, 9, 40)
    masked, mask = copy.deepcopy(attn), torch.arange(3) < heads
    masked.out.weight[:, (~mask).repeat_interleave(7)] = 0
    surgery.cut(part, surgery.AttnMask(heads=mask))
    torch.testing.assert_close(attn.attend(x, None, memory), masked.attend(x, None, memory), atol=1e-5, rtol=1e-5)
    assert (part.width, part.memory_width, part.shape["heads"], part.shape["scale"]) == (24, 40, heads, 0.3)
