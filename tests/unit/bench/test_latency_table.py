"""The cost table of a latency budget: what is measured, and narrowed blocks."""

import pytest
import torch

from clipress.bench.latency_table import cost_table, levels_of, narrow_block, unit_counts
from clipress.compress.prune.costs import latency_curve
from clipress.compress.prune.gates import sites
from clipress.data.transforms import Preprocess
from clipress.errors import RecipeError
from clipress.models import anatomy, blip
from clipress.models.load import Model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named

CLASSIFIER = {"width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32, "labels": ["cat", "dog"]}


def classifier():
    return task_named("classification").student_from(CLASSIFIER, None, 0)


@pytest.mark.parametrize("make", [lambda: new_model(tiny_architecture(layers=1), 0), classifier])
@pytest.mark.parametrize(
    ("index", "kind", "level", "shape"),
    [
        (0, "heads", 1, (1, 16, 16, 128)),
        (0, "qk", 3, (2, 3, 16, 128)),
        (0, "v", 5, (2, 16, 5, 128)),
        (1, "ffn", 40, (2, 16, 16, 40)),
    ],
)
def test_narrowing_a_block_changes_one_kind_and_leaves_the_model_intact(make, index, kind, level, shape):
    block = anatomy.blocks(make().module)[0]
    before = [part.shape for part in block.parts]
    narrow = narrow_block(block, index, kind, level)
    assert [part.shape for part in block.parts] == before
    attn, ffn = anatomy.Block(block.tower, block.name, narrow, block.tokens, block.ffn).parts
    assert (attn.module.heads, attn.module.qk_dim, attn.module.v_dim, ffn.hidden) == shape
    assert narrow(torch.randn(2, block.tokens, block.width)).shape == (2, block.tokens, block.width)


@pytest.mark.parametrize(
    ("model", "towers"),
    [
        (new_model(tiny_architecture(layers=1), 0), ["image", "text"]),
        (classifier(), ["image"]),
    ],
)
def test_a_table_covers_every_kind_and_tower_and_prices_every_site(model, towers):
    done = []
    table = cost_table(model, batch=1, threads=1, duration_ms=1, done=done.append)
    assert done == [f"{tower} {kind}" for tower in towers for kind in ("heads", "qk", "v", "ffn")]
    for part in anatomy.parts(model.module):
        for kind, units in unit_counts(part).items():
            points = table["towers"][part.tower][kind]
            assert points["levels"] == [0, *levels_of(units)] and len(points["ms"]) == len(points["levels"])
    for site in sites(model.module, "separate"):
        curve = latency_curve(site, table)
        assert len(curve) == site.units + 1 and curve[0] == 0 and (curve[1:] >= curve[:-1]).all()


def test_blocks_with_cross_attentions_are_refused():
    image = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    text = {"vocabulary": 60, "width": 32, "layers": 1, "heads": 2, "positions": 8}
    architecture = {"task": "caption", "image": image, "text": text, "context_length": 8}
    model = Model(blip.build(architecture, 0), architecture, Preprocess(size=32), None, task="caption")
    with pytest.raises(
        RecipeError, match=r"found text_decoder\.layers\.0 with cross-attentions too\. Use a budget of params"
    ):
        cost_table(model, batch=1, threads=1, duration_ms=1, done=print)
