"""Layer costs match arithmetic and sum to the cost of the model."""

import pytest

from clipress.bench.layers import ELSE, layer_costs
from clipress.models import anatomy
from clipress.models.load import Model, build, new_model
from clipress.models.tiny import tiny_architecture

WIDTH, LAYERS, PATCHES, EMBED, LENGTH = 48, 3, 16, 20, 24


@pytest.fixture(scope="module")
def model():
    return new_model(tiny_architecture(width=WIDTH, layers=LAYERS, embed_dim=EMBED), 0)


def block_macs(tokens):
    linear = tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * 4 * WIDTH)
    return linear + 2 * tokens * tokens * WIDTH


def test_block_costs_match_arithmetic(model):
    rows = layer_costs(model)
    assert [row["tower"] for row in rows] == ["image"] * 4 + ["text"] * 4
    assert rows[1]["name"] == "visual.transformer.resblocks.1" and rows[3]["name"] == rows[7]["name"] == ELSE
    assert [row["macs"] for row in rows[:3]] == [block_macs(PATCHES + 1)] * 3
    assert [row["macs"] for row in rows[4:7]] == [block_macs(LENGTH)] * 3
    assert rows[3]["macs"] == PATCHES * 3 * 8 * 8 * WIDTH + WIDTH * EMBED and rows[7]["macs"] == WIDTH * EMBED
    weights, biases, norms = 12 * WIDTH * WIDTH, 9 * WIDTH, 4 * WIDTH
    assert {row["params"] for row in rows if row["name"] != ELSE} == {weights + biases + norms}


def test_a_cut_block_costs_less_by_exactly_the_removed_part(model):
    from clipress.models import surgery

    whole = layer_costs(model)
    shapes = surgery.shapes(model.module)
    name = "visual.transformer.resblocks.1"
    shapes[name] = {**shapes[name], "ffn": 4 * WIDTH - 64}
    cut = Model(
        surgery.reshape(build(model.architecture), shapes), model.architecture, model.preprocess, model.tokenizer
    )
    found = layer_costs(cut)
    assert whole[1]["macs"] - found[1]["macs"] == (PATCHES + 1) * 2 * WIDTH * 64
    assert whole[1]["params"] - found[1]["params"] == 2 * WIDTH * 64 + 64
    assert [row for i, row in enumerate(found) if i != 1] == [row for i, row in enumerate(whole) if i != 1]


def test_layer_costs_sum_to_the_model_for_any_image_tower(model):
    text = {"context_length": LENGTH, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    convolutional = {"embed_dim": 16, "vision_cfg": resnet, "text_cfg": text}
    for one in (model, new_model(convolutional, 0)):
        one.module.eval()  # In training mode, batch norms need more than one image.
        rows = layer_costs(one)
        assert sum(row["params"] for row in rows) == anatomy.counts(one.module)["params"] - 1  # All but logit_scale.
        assert all(row["macs"] >= 0 and row["params"] >= 0 for row in rows)
    assert {"visual.conv1", "visual.layer1.0", "visual.layer4.0", "visual.attnpool"} <= {row["name"] for row in rows}


def test_an_attention_pool_is_counted_and_weights_stay_trainable():
    vision = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear", "image_size": 160}
    model = new_model({**tiny_architecture(layers=1), "vision_cfg": vision}, 0)
    rows, (_, pool) = (
        layer_costs(model),
        next(p for p in model.module.visual.named_modules() if p[0].endswith("attn_pool")),
    )
    image, tokens = [row for row in rows if row["tower"] == "image"], 101
    per_token = sum(getattr(pool, name).weight.numel() for name in ("kv",))
    once = sum(layer.weight.numel() for layer in (pool.q, pool.proj, pool.mlp.fc1, pool.mlp.fc2))
    patches, width, projection = 100 * 3 * 16 * 16, pool.kv.in_features, 32
    expected = patches * width + tokens * per_token + once + 2 * tokens * width + width * projection
    assert image[-1] == {**image[-1], "name": ELSE, "macs": expected}
    assert all(parameter.requires_grad for parameter in model.module.parameters())
