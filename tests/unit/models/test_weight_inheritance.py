"""Students that inherit weights match slow reference constructions."""

import re

import numpy as np
import open_clip
import pytest
import torch

from clipress.artifact import load_artifact, save_artifact
from clipress.errors import RecipeError
from clipress.models import anatomy, surgery
from clipress.models.load import artifact_from_model, new_model, save_for_open_clip
from clipress.models.tiny import tiny_architecture
from clipress.models.weight_inheritance import Size, inherited
from clipress.tasks import model_from_artifact

HEAD = 16


def clip_of(layers=2, width=32, ffn=None, seed=0, **more):
    """Return a CLIP with heads of width 16 and random biases and gains."""
    architecture = tiny_architecture(layers=layers, width=width)
    for tower in anatomy.CONFIG_KEYS.values():
        architecture[tower]["mlp_ratio"] = (ffn or 4 * width) / width
    model = new_model(architecture | more, seed)
    torch.manual_seed(seed)
    for parameter in model.module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.8, 0.4)
    model.module.eval()
    return model


@torch.no_grad()
def outputs(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 400, (3, 24), generator=generator)
    ids[:, -1] = 49407
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return model.eval().encode_image(pixels), model.encode_text(ids)


def assert_same(found, wanted, close=1e-5):
    for a, b in zip(outputs(found), outputs(wanted), strict=True):
        torch.testing.assert_close(a, b, atol=close, rtol=close)


def worst(scores, kept):
    """Return the indices of all but the best, by a plain sort."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[kept:]


@torch.no_grad()
def silence(block, heads, ffn):
    """Zero the weights of all but the best heads and hidden units, one by one."""
    attn, ffn_part = block.parts[0].module, block.parts[1]
    rows = [slice(h * HEAD, (h + 1) * HEAD) for h in range(attn.heads)]
    v, out = attn.v.weight.double().numpy(), attn.out.weight.double().numpy()
    for h in worst([np.sqrt((v[r] ** 2).sum()) * np.sqrt((out[:, r] ** 2).sum()) for r in rows], heads):
        for linear in (attn.q, attn.k, attn.v):
            linear.weight[rows[h]] = 0
            linear.bias[rows[h]] = 0
    linear_in, linear_out = ffn_part.linear_in, ffn_part.linear_out
    first, second = linear_in.weight.double().numpy(), linear_out.weight.double().numpy()
    units = [np.sqrt((first[i] ** 2).sum()) * np.sqrt((second[:, i] ** 2).sum()) for i in range(len(first))]
    for i in worst(units, ffn):
        linear_in.weight[i] = 0
        linear_in.bias[i] = 0


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(("heads", "ffn"), [(1, 37), (2, 128), (3, 5)])
def test_dropping_heads_and_units_equals_zeroing_them(heads, ffn, custom_text, tmp_path):
    teacher = clip_of(width=48, ffn=128, custom_text=custom_text)
    before = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    size = Size(heads=heads, ffn=ffn)
    student = inherited(teacher, {"image": size, "text": size})
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.module.state_dict().items())
    for attn, feed_forward in (block.parts for block in anatomy.blocks(student.module)):
        assert (attn.module.heads, feed_forward.hidden, attn.width) == (heads, ffn, 48)
    for block in anatomy.blocks(teacher.module):
        silence(block, heads, ffn)
    assert_same(student.module, teacher.module)
    # open_clip's config can only express as many heads as fill the width.
    assert save_for_open_clip(student, tmp_path / "open_clip") is (heads == 3)
    save_artifact(artifact_from_model(student, (), {}), tmp_path / "a")
    for wanted, found in zip(
        outputs(student.module), outputs(model_from_artifact(load_artifact(tmp_path / "a")).module), strict=True
    ):
        assert torch.equal(found, wanted)


def test_one_tower_may_keep_the_teachers_sizes():
    teacher = clip_of(width=48)
    student = inherited(teacher, {"text": Size(ffn=16)})
    assert torch.equal(outputs(student.module)[0], outputs(teacher.module)[0])
    assert student.architecture["vision_cfg"] == teacher.architecture["vision_cfg"]
    assert not torch.allclose(outputs(student.module)[1], outputs(teacher.module)[1])
    assert (student.preprocess, student.tokenizer) == (teacher.preprocess, teacher.tokenizer)


def test_the_open_clip_config_gives_exact_feed_forward_widths(tmp_path):
    assert int(112 * (244 / 112)) == 243  # This is how open_clip would read the plain ratio.
    student = inherited(clip_of(layers=1, width=112), {"image": Size(ffn=244)})
    assert student.module.visual.transformer.resblocks[0].mlp.c_fc.out_features == 244
    assert save_for_open_clip(student, tmp_path / "open_clip")


@pytest.mark.parametrize(("of", "kept", "wanted"), [(4, 2, [0, 2]), (5, 3, [0, 1, 3]), (4, 1, [0]), (3, 3, [0, 1, 2])])
def test_layers_are_evenly_spaced_from_the_first(of, kept, wanted):
    teacher = clip_of(layers=of)
    student = inherited(teacher, {"image": Size(layers=kept), "text": Size(layers=kept)})
    for tower in anatomy.TOWERS:
        own, theirs = (
            [part.linear_in.weight for part in anatomy.ffns(model.module) if part.tower == tower]
            for model in (student, teacher)
        )
        assert len(own) == kept and all(torch.equal(a, theirs[i]) for a, i in zip(own, wanted, strict=True))
    assert student.architecture["text_cfg"]["layers"] == student.architecture["vision_cfg"]["layers"] == kept


def places(rng, of, count, width=1):
    """Choose random groups of `width` indices, in order."""
    chosen = np.sort(rng.choice(of, count, replace=False))
    return (chosen[:, None] * width + np.arange(width)).ravel()


def planted(small, big, seed=0):
    """Hide a small model in a large one: its weights at random indices of layers 0 and 2, tiny values elsewhere."""
    rng = np.random.default_rng(seed)
    source, target = (model.module.state_dict() for model in (small, big))
    channels = {tower: places(rng, 64, 32) for tower in anatomy.TOWERS}
    at = {name: tuple(map(np.arange, tensor.shape)) for name, tensor in source.items()}
    inner = {}
    for name in source:
        tower, block = anatomy.tower_of(small.module, name), re.search(r"resblocks\.(\d)\.", name)
        heads, ffn = inner.setdefault((tower, block and block[1]), (places(rng, 4, 2, HEAD), places(rng, 200, 90)))
        for axis, side in enumerate(source[name].shape):
            if block is None:  # 32 channels, 17 and 24 positions, embeddings of width 40.
                here = {32: channels.get(tower)}
            elif "attn.out" in name or "c_proj" in name:
                here = {32: channels[tower]} if axis == 0 else {32: heads, 90: ffn}
            elif "ln_" in name or axis == 1:
                here = {32: channels[tower]}
            else:
                here = {32: heads, 90: ffn}
            if here.get(side) is not None:
                at[name] = (*at[name][:axis], here[side], *at[name][axis + 1 :])
    for tensor in target.values():
        tensor.copy_(1e-4 * torch.from_numpy(rng.standard_normal(tuple(tensor.shape))))
    for name, tensor in source.items():
        place = target[re.sub(r"resblocks\.1\.", "resblocks.2.", name)].numpy()
        place[np.ix_(*at[name]) if tensor.ndim else ()] = tensor.numpy()


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_small_model_hidden_in_a_large_one_is_recovered(custom_text, tmp_path):
    small = clip_of(layers=2, width=32, ffn=90, embed_dim=40, custom_text=custom_text)
    big = clip_of(layers=4, width=64, ffn=200, embed_dim=40, custom_text=custom_text)
    planted(small, big)
    size = Size(layers=2, heads=2, width=32, ffn=90)
    student = inherited(big, {"image": size, "text": size})
    assert_same(student.module, small.module, close=1e-6)
    assert surgery.shapes(student.module) == surgery.shapes(small.module)
    assert save_for_open_clip(student, tmp_path / "open_clip")  # The architecture is an ordinary one.
    stock = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}", require_pretrained=True)
    assert_same(stock, small.module)


def slow_channels(weights, tower, layers, count):
    """Return the channels with the largest norms over all matrices that write or read them, in plain NumPy."""
    state = {name: tensor.double().numpy() for name, tensor in weights.items()}
    top = "visual." if tower == "image" else ""
    ends = {
        "image": [("conv1.weight", "c...", None), ("positional_embedding", "nc", None), ("proj", "cd", "ln_post")],
        "text": [
            ("token_embedding.weight", "nc", None),
            ("positional_embedding", "nc", None),
            ("text_projection", "cd", "ln_final"),
        ],
    }[tower]
    parts = [(top + name, form, norm and f"{top}{norm}.weight") for name, form, norm in ends]
    for layer in layers:
        at = f"{top}transformer.resblocks.{layer}."
        parts += [(f"{at}attn.{p}.weight", "dc", f"{at}ln_1.weight") for p in "qkv"]
        parts += [(f"{at}attn.out.weight", "cd", None), (f"{at}mlp.c_proj.weight", "cd", None)]
        parts += [(f"{at}mlp.c_fc.weight", "dc", f"{at}ln_2.weight")]
    total = 0
    for name, form, gain in parts:
        width = state[name].shape[form.index("c")]
        norms = np.array([np.linalg.norm(np.take(state[name], c, axis=form.index("c"))) for c in range(width)])
        norms *= np.abs(state[gain]) if gain else 1
        total = total + norms / norms.mean()
    return sorted(sorted(range(len(total)), key=lambda c: -total[c])[:count])


@pytest.mark.parametrize("width", [20, 41])
@pytest.mark.parametrize("tower", anatomy.TOWERS)
def test_width_keeps_the_channels_with_the_largest_norms_in_the_tower(tower, width):
    teacher = clip_of(layers=2, width=48, seed=3)
    student = inherited(teacher, {tower: Size(width=width)})
    theirs, own = teacher.module.state_dict(), student.module.state_dict()
    kept = slow_channels(theirs, tower, (0, 1), width)
    assert kept != list(range(width))
    at = ("visual." if tower == "image" else "") + "transformer.resblocks.1."
    for name, axis in (("attn.q.weight", 1), ("attn.out.weight", 0), ("mlp.c_proj.bias", 0), ("ln_2.weight", 0)):
        assert torch.equal(own[at + name], theirs[at + name].index_select(axis, torch.tensor(kept)))
    # The 3 heads of width 16 stay, which no open_clip config can express for this number of channels.
    part = next(part for part in anatomy.attentions(student.module) if part.tower == tower)
    assert part.shape == {"heads": 3, "qk_dim": HEAD, "v_dim": HEAD, "scale": HEAD**-0.5} and part.width == width
    other = 1 - anatomy.TOWERS.index(tower)
    assert torch.equal(outputs(student.module)[other], outputs(teacher.module)[other])


def test_a_pruned_teacher_passes_on_its_remaining_dims(tmp_path):
    teacher = clip_of(layers=2)
    for number, block in enumerate(anatomy.blocks(teacher.module)):
        dims = torch.arange(HEAD).expand(2, HEAD) < 8 + 2 * number
        attn, ffn = block.parts
        surgery.cut(attn, surgery.AttnMask(dims, dims))
        surgery.cut(ffn, surgery.FfnMask(torch.arange(128) < 64 + number))
    student = inherited(teacher, {"image": Size(layers=1, width=24), "text": Size(heads=1)})
    first, *_, last = [
        attn.shape | ffn.shape for attn, ffn in (block.parts for block in anatomy.blocks(student.module))
    ]
    assert (first["qk_dim"], first["ffn"], last["qk_dim"], last["ffn"]) == (8, 64, 14, 67)
    assert first["scale"] == HEAD**-0.5
    save_artifact(artifact_from_model(student, (), {}), tmp_path / "a")
    again = model_from_artifact(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(outputs(again.module), outputs(student.module), strict=True))


def test_layer_scales_are_inherited_with_their_channels():
    teacher = clip_of(width=48)
    teacher.architecture["vision_cfg"]["ls_init_value"] = 0.5
    teacher = new_model(teacher.architecture, 0)
    student = inherited(teacher, {"image": Size(width=32, heads=2)})
    assert student.module.visual.transformer.resblocks[0].ls_1.gamma.shape == (32,)
    assert outputs(student.module)[0].shape == (3, 32)


TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 32}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32}


def test_heads_and_units_are_inherited_from_timm_transformers():
    teacher = clip_of(vision_cfg=TIMM, custom_text=True)
    student = inherited(teacher, {"image": Size(heads=1, ffn=48)})
    for block in anatomy.blocks(teacher.module):
        if block.tower == "image":
            assert block.parts[0].module.v_dim == 32  # silence() counts in heads of width 16.
            _silence_timm(block)
    torch.testing.assert_close(outputs(student.module)[0], outputs(teacher.module)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def _silence_timm(block):
    attn, ffn = block.parts[0].module, block.parts[1]
    dim = attn.v_dim
    score = [
        attn.v.weight[h * dim : (h + 1) * dim].norm() * attn.out.weight[:, h * dim : (h + 1) * dim].norm()
        for h in range(attn.heads)
    ]
    for h in worst(score, 1):
        attn.v.weight[h * dim : (h + 1) * dim] = 0
        attn.v.bias[h * dim : (h + 1) * dim] = 0
    for i in worst((ffn.linear_in.weight.norm(dim=1) * ffn.linear_out.weight.norm(dim=0)).tolist(), 48):
        ffn.linear_out.weight[:, i] = 0


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"vision_cfg": TIMM, "custom_text": True}, Size(width=32), "timm's name fixes layers and width"),
        ({"vision_cfg": TIMM, "custom_text": True}, Size(layers=1), "timm's name fixes layers and width"),
        ({"vision_cfg": RESNET}, Size(heads=1), "no transformer blocks to inherit from"),
        ({}, Size(heads=3), r"image\.heads: expected at most the teacher\'s 2, found 3"),
        ({}, Size(ffn=129), r"image\.ffn: expected at most the teacher\'s 128, found 129"),
    ],
)
def test_sizes_larger_than_the_teacher_are_reported(changes, size, message):
    with pytest.raises(RecipeError, match=message):
        inherited(clip_of(**changes), {"image": size})


def test_width_is_refused_for_embeddings_and_unknown_parts():
    teacher = clip_of(custom_text=True)
    teacher.architecture["text_cfg"]["proj_type"] = "none"
    with pytest.raises(RecipeError, match=r"text\.width: without a projection"):
        inherited(new_model(teacher.architecture, 0), {"text": Size(width=16)})
    teacher.architecture["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2}
    with pytest.raises(RecipeError, match=r"image\.width: visual\.attn_pool.*Leave out 'width'"):
        inherited(new_model(teacher.architecture, 0), {"image": Size(width=16)})
