"""Blocks with rotary positions, gates and norms inside, and ConvNeXt's: cutting equals masking, costs are exact, files restore them."""

import warnings

import onnxruntime
import pytest
import timm
import torch

from clipress.artifact import load_artifact, save_artifact
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.refit import Refit, cut_and_refit
from clipress.compress.prune.rotate import rotate
from clipress.compress.sparsify import zero_two_of_four
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError
from clipress.models import anatomy, convnets, quantizers, surgery
from clipress.models.load import Model, artifact_from_model, new_model
from clipress.models.partial_norm import PartialNorm
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
EVA = {
    "EVA-01": ("eva_giant_patch14_224", {}),
    "EVA-02, rotary with gates and norms": ("eva02_base_patch16_clip_224", {}),
    "EVA-02 E, norms behind the parts": ("eva02_enormous_patch14_clip_224", {}),
    "PE, rotary": ("vit_pe_core_tiny_patch16_384", {"attn_pool_num_heads": 3}),
}
KINDS = [("separate", None), ("separate", {"image": ("heads", "ffn")}), ("upop", None)]


def disturbed(model, seed=0):
    """Give norms, biases and layer scales values that are not their initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = 0.4 + 0.4 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def stock(kind):
    torch.manual_seed(0)
    name, changes = EVA[kind]
    return disturbed(timm.create_model(name, **SIZES, **changes))


@torch.no_grad()
def features(model):
    return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def masked(model, space, kinds, seed):
    """Return a model's gates, which keep some random units of every site."""
    gates, generator = Gates(model, space, kinds), torch.Generator().manual_seed(seed)
    for site in gates.sites:
        keep = int(torch.randint(0 if site.kind in ("ffn", "heads") else 1, site.units + 1, (), generator=generator))
        order = torch.rand(site.groups, site.units, generator=generator).argsort(1).argsort(1)
        site.mask = (order < keep).float()
    return gates


def block_params(model):
    return sum(p.numel() for block in anatomy.blocks(model) for p in block.module.parameters())


@pytest.mark.parametrize("kind", EVA)
def test_attention_matches_timm_and_keeps_its_parameter_names(kind):
    model = stock(kind)
    wanted, names = features(model), dict(model.state_dict())
    own = surgery.use_own_attention(model)
    assert not list(anatomy.stock_attentions(own)) and len(anatomy.parts(own)) == 4
    torch.testing.assert_close(features(own), wanted, atol=1e-5, rtol=1e-5)
    again = surgery.stock_weights(own)
    assert again.keys() == names.keys() and all(torch.equal(again[name], names[name]) for name in names)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("space", "kinds"), KINDS)
@pytest.mark.parametrize("kind", EVA)
def test_a_cut_model_matches_the_masked_model_at_the_stated_cost(kind, space, kinds, seed):
    model = surgery.use_own_attention(stock(kind))
    uncut, before = features(model), block_params(model)
    gates = masked(model, space, kinds, seed)
    saved = sum(site.params * (site.units - int(site.mask[0].sum())) for site in gates.sites)
    wanted, masks = features(model), gates.part_masks()
    gates.remove()
    for part, mask in masks:
        surgery.cut(part, mask)
    assert (wanted - uncut).abs().max() > 1e-2
    torch.testing.assert_close(features(model), wanted, atol=1e-5, rtol=1e-5)
    assert before - block_params(model) == saved


def test_a_gate_measures_the_norm_that_its_unit_goes_through():
    model = surgery.use_own_attention(stock("EVA-02, rotary with gates and norms"))
    gates = Gates(model, "separate")
    site = next(site for site in gates.sites if site.kind == "ffn")
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def loss():
        return model(x).double().sum()

    loss().backward()
    found = site.gradient()[0, 0, 5]
    step = 1e-2
    values = []
    for change in (step, -step):
        site.mask[0, 5] = 1 + change
        with torch.no_grad():
            values.append(loss())
    torch.testing.assert_close(found.double(), (values[0] - values[1]) / (2 * step), atol=1e-2, rtol=1e-2)


def test_rotation_keeps_rotary_queries_and_normed_values():
    model = surgery.use_own_attention(stock("PE, rotary"))
    wanted, q = features(model), model.blocks[0].attn.q.weight.clone()
    v = model.blocks[0].attn.v.weight.clone()
    rotate(anatomy.attentions(model), lambda: features(model))
    assert torch.equal(model.blocks[0].attn.q.weight, q) and not torch.equal(model.blocks[0].attn.v.weight, v)
    torch.testing.assert_close(features(model), wanted, atol=1e-3, rtol=1e-3)
    model = surgery.use_own_attention(stock("EVA-02, rotary with gates and norms"))
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotate(anatomy.attentions(model), lambda: features(model))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_half_of_a_rotary_pair_is_refused():
    part = anatomy.attentions(surgery.use_own_attention(stock("PE, rotary")))[0]
    with pytest.raises(ValueError, match="expected pairs"):
        surgery.cut(part, surgery.AttnMask(qk=torch.arange(16).expand(3, 16) < 5))


@pytest.mark.parametrize("kept", [6, 3, 0])
def test_a_partial_norm_counts_cut_units_as_zeros(kept):
    whole, x = disturbed(torch.nn.LayerNorm(6)), torch.randn(4, 6)
    x[:, kept:] = 0
    partial = PartialNorm(6, kept, whole.eps)
    partial.load_state_dict({name: tensor[:kept] for name, tensor in whole.state_dict().items()})
    torch.testing.assert_close(partial(x[:, :kept]), whole(x)[:, :kept], atol=1e-5, rtol=1e-5)


def cut_at_random(model, kinds=None):
    gates = masked(model, "separate", kinds, 0)
    masks = gates.part_masks()
    gates.remove()
    for part, mask in masks:
        surgery.cut(part, mask)


@pytest.mark.parametrize("kind", EVA)
def test_shapes_and_weights_restore_a_cut_model_bitwise(kind):
    model = surgery.use_own_attention(stock(kind))
    cut_at_random(model)
    again = surgery.reshape(surgery.use_own_attention(stock(kind)), surgery.shapes(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(features(again), features(model))


def test_pairs_that_a_head_does_not_have_are_refused():
    model = surgery.use_own_attention(stock("PE, rotary"))
    state = model.state_dict()
    state["blocks.0.attn.pairs"] = state["blocks.0.attn.pairs"] + 1
    with pytest.raises(RuntimeError, match=r"blocks.0.attn.pairs: expected pairs of dims from 0 to 7"):
        model.load_state_dict(state)
    shapes = surgery.shapes(model)
    shapes["blocks.0"]["qk_dim"] = 7
    with pytest.raises(ArtifactError, match="make no sense"):
        surgery.reshape(model, shapes)


def clip(name, size):
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": size}
    architecture = tiny_architecture(layers=1) | {"vision_cfg": vision, "custom_text": True}
    model = new_model(architecture, 0)
    disturbed(model.module)
    return model


def test_convnext_is_cut_in_its_inverted_bottlenecks(tmp_path):
    whole = clip("test_convnext", 64)
    model = whole.module
    found = [block for block in anatomy.blocks(model) if block.tower == "image"]
    assert found and not convnets.is_convnet(model) and convnets.is_convolutional(model)
    assert all([type(part) for part in block.parts] == [anatomy.Ffn] for block in found)
    with pytest.raises(ArtifactError, match="no transformer blocks"):
        anatomy.token_layer(model, "image")
    seen = {}
    for block in found:
        block.module.mlp.register_forward_hook(
            lambda _, args, __, name=block.name: seen.update({name: args[0].shape[1:3].numel()})
        )
    x, before = torch.randn(2, 3, 64, 64), block_params(model)
    with torch.no_grad():
        uncut = model.encode_image(x)
    assert seen == {block.name: block.tokens for block in found}
    gates = masked(model, "separate", {"text": ()}, 0)
    saved = sum(site.params * (site.units - int(site.mask[0].sum())) for site in gates.sites)
    with torch.no_grad():
        wanted = model.encode_image(x)
    masks = gates.part_masks()
    gates.remove()
    for part, mask in masks:
        surgery.cut(part, mask)
    with torch.no_grad():
        assert (wanted - uncut).abs().max() > 1e-2
        torch.testing.assert_close(model.encode_image(x), wanted, atol=1e-5, rtol=1e-5)
    assert before - block_params(model) == saved
    save_artifact(artifact_from_model(whole, (), {}), tmp_path / "a")
    read = model_from_artifact(load_artifact(tmp_path / "a")).module
    with torch.no_grad():
        assert torch.equal(read.encode_image(x), model.encode_image(x))


@pytest.mark.parametrize("kind", EVA)
def test_onnx_runtime_computes_what_a_cut_model_does(kind, tmp_path):
    model = surgery.use_own_attention(stock(kind))
    cut_at_random(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(tmp_path / "a.onnx"), input_names=["x"], opset_version=18, dynamo=False)
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "a.onnx")).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), features(model), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", EVA)
def test_linears_of_these_blocks_become_two_of_four_and_once_cut_int8(kind):
    model = surgery.use_own_attention(stock(kind))
    report = zero_two_of_four(model, features)
    fit = {
        f"blocks.{name}.weight"
        for name, module in model.blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and not (module.out_features % 8 or module.in_features % 16)
    }
    assert len(fit) >= 8 and fit <= set(report.weights) and not report.by_magnitude
    cut_at_random(model)
    wanted = features(model)
    quantizers.attach(model, [name for name in quantizers.quantizable(model) if name.startswith("blocks")], features)
    assert 0 < (features(model) - wanted).abs().max() < wanted.abs().max()


@pytest.mark.parametrize("kind", EVA)
def test_a_refit_brings_a_cut_model_back_where_parts_write_to_the_stream(kind):
    model, plain = (surgery.use_own_attention(stock(kind)) for _ in range(2))
    if "norms behind" in kind:
        assert not any(block.is_residual for block in anatomy.blocks(model))
        return
    wanted, gates = features(model), masked(model, "separate", None, 0)
    masks = {part.name: mask for part, mask in gates.part_masks()}
    gates.remove()
    for part in anatomy.parts(plain):
        surgery.cut(part, masks[part.name])
    generator = torch.Generator().manual_seed(2)
    samples = [{"image": {"pixel_values": torch.randn(16, 3, 32, 32, generator=generator)}} for _ in range(8)]
    whole = Model(model, {}, Preprocess(size=32), None, task="classification")
    cut_and_refit(anatomy.blocks(model), whole, samples, lambda part: surgery.cut(part, masks[part.name]), Refit())
    refitted, lost = ((features(one) - wanted).square().mean() for one in (model, plain))
    assert refitted < 0.1 * lost
