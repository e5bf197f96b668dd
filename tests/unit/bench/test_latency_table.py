"""The cost table of a latency budget: what is measured, and narrowed blocks."""

import numpy as np
import pytest
import torch
from task_students import STUDENTS

from clipress.bench.latency_table import (
    Alone,
    cost_table,
    cuttables,
    inputs_of,
    levels_of,
    narrow_block,
    unit_counts,
)
from clipress.compress.prune.costs import cost_model, latency_curve
from clipress.compress.prune.gates import level_costs, sites
from clipress.models import anatomy
from clipress.models.load import new_model
from clipress.models.parts import cost_name
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


def blip_of(task):
    return task_named(task).student_from(STUDENTS[task], None, 0)


@pytest.mark.parametrize(("task", "towers"), [("nlvr", ["text"]), ("vqa", ["question", "answer"])])
def test_cross_attentions_are_measured_by_themselves_with_all_of_their_memory(task, towers):
    model, done = blip_of(task), []
    table = cost_table(model, batch=2, threads=1, duration_ms=1, done=done.append)
    own, crossed = ["heads", "qk", "v"], ["cross_heads", "cross_qk", "cross_v"]
    expected = [f"image {kind}" for kind in (*own, "ffn")]
    expected += [f"{tower} {kind}" for tower in towers for kind in (*own, *crossed, "ffn")]
    assert done == expected and len(cuttables(model.module)) == len(expected)
    for tower in towers:
        assert table["towers"][tower].keys() == {*own, *crossed, "ffn"}
    for site in sites(model.module, "separate"):
        assert len(latency_curve(site, table)) == site.units + 1


def test_a_block_is_measured_on_memories_of_the_length_and_width_that_it_reads():
    (first, *_, last) = [block for block in anatomy.blocks(blip_of("vqa").module) if block.memory]
    images, questions = 17, 16  # patches and a class token, ids of a question
    for block, memory in ((first, images), (last, questions)):
        inputs = inputs_of(block, 3)
        assert inputs["x"].shape == (3, block.tokens, 32) and inputs["memory_0"].shape == (3, memory, 32)
    pair = next(block for block in anatomy.blocks(blip_of("nlvr").module) if block.memory)
    narrow = narrow_block(pair, 2, "v", 5)
    x, *memories = map(torch.from_numpy, inputs_of(pair, 3).values())
    assert [cross.v_dim for cross in narrow.cross] == [16, 5] and narrow.attn.v_dim == 16
    torch.testing.assert_close(Alone(narrow)(x, *memories), narrow(x, None, memories))
    assert not torch.allclose(Alone(narrow)(x, *memories), Alone(narrow)(x, *memories[::-1]))


def test_a_table_of_multiply_accumulates_prices_every_part_as_counting_does():
    """Self-attention and cross-attention of one tower differ in their costs, and each site finds its own."""
    module = blip_of("vqa").module
    towers = {}
    for part in anatomy.parts(module):
        for kind, units in unit_counts(part).items():
            points = {"levels": [0, units], "ms": [1.0, 1.0 + units * level_costs(part)[kind][1]]}
            towers.setdefault(part.tower, {})[cost_name(part, kind)] = points
    found = sites(module, "separate", {tower: ("heads", "ffn") for tower in towers})
    by_table, counted = (cost_model(module, found, unit, {"towers": towers}) for unit in ("latency", "macs"))
    for site, ours, theirs in zip(found, by_table.curves, counted.curves, strict=True):
        np.testing.assert_allclose(ours, theirs, err_msg=site.name)
    assert len({float(curve[1]) for site, curve in zip(found, counted.curves, strict=True) if site.kind == "heads"}) > 2
