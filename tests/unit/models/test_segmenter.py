"""The Segmenter computes what its paper's code does, and is cut like other models."""

import pytest
import torch
from segmenter_reference import HEADS, LABELS, PATCH, SIZE, WIDTH, as_published, pixels

from clipress.errors import ArtifactError
from clipress.models import anatomy, segmenter, surgery
from clipress.models.anatomy import Attn
from clipress.models.surgery import AttnMask, FfnMask

SIZES = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
ARCHITECTURE = {"sizes": SIZES, "labels": LABELS, "decoder_layers": 2}


@pytest.fixture
def model():
    made = segmenter.build(ARCHITECTURE, 0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def test_it_computes_what_is_published(model):
    with torch.no_grad():
        found, wanted = model(pixels()), as_published(surgery.stock_weights(model), pixels())
    assert found.shape == (2, len(LABELS), 3, 3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_its_towers_are_the_encoder_and_the_decoder(model):
    assert anatomy.towers(model) == ("image", "decoder")
    found = [(block.tower, block.name, block.tokens) for block in anatomy.blocks(model)]
    assert found == [
        *(("image", f"encoder.blocks.{i}", 10) for i in range(2)),
        *(("decoder", f"decoder.blocks.{i}", 14) for i in range(2)),
    ]
    sides = [sum(p.numel() for p in anatomy.tower_parameters(model, tower)) for tower in anatomy.towers(model)]
    assert sum(sides) == sum(p.numel() for p in model.parameters())
    assert anatomy.image_size(model) == (SIZE, SIZE)


def test_a_cut_one_computes_what_the_masked_one_does(model):
    generator = torch.Generator().manual_seed(3)
    slim = segmenter.build(ARCHITECTURE, 0).eval()
    slim.load_state_dict(model.state_dict())
    for part, other in zip(anatomy.parts(model), anatomy.parts(slim), strict=True):
        if isinstance(part, Attn):
            keep = torch.zeros(HEADS, WIDTH // HEADS, dtype=torch.bool)
            keep[:, torch.randperm(WIDTH // HEADS, generator=generator)[:20]] = True
            for linear, mask in ((part.module.q, keep), (part.module.k, keep), (part.module.v, keep)):
                linear.weight.data *= mask.flatten()[:, None]
                linear.bias.data *= mask.flatten()
            surgery.cut(other, AttnMask(qk=keep, v=keep))
        else:
            keep = torch.rand(part.hidden, generator=generator) < 0.4
            part.linear_out.weight.data *= keep
            surgery.cut(other, FfnMask(keep))
    with torch.no_grad():
        torch.testing.assert_close(slim(pixels()), model(pixels()), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            slim(pixels()), as_published(surgery.stock_weights(slim), pixels()), atol=1e-5, rtol=1e-5
        )


def test_segmenter_s_of_ade20k_has_the_published_size():
    sizes = {"img_size": 512, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    with torch.device("meta"):
        model = segmenter.build({"sizes": sizes, "labels": [str(n) for n in range(150)], "decoder_layers": 2})
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 26.03  # 26.42 with the unused classifier


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": {**SIZES, "depth": 10**6}}, {"sizes": {**SIZES, "drop": 1}}, {"sizes": {"depth": 2}}, {"labels": []},
        {"labels": [1]}, {"decoder_layers": 0}, {"decoder_layers": "2"}, {"sizes": {**SIZES, "embed_dim": True + 0.5}},
    ],
)  # fmt: skip
def test_an_absurd_architecture_is_refused(change):
    with pytest.raises(ArtifactError, match="architecture"):
        segmenter.build({**ARCHITECTURE, **change})
