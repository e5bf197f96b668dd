"""FPGM and LAMP against loops over units in NumPy."""

import numpy as np
import pytest
import torch

from clipress.compress.prune.criterion import CRITERIA
from clipress.compress.prune.gates import sites
from clipress.compress.prune.weight_criteria import unit_weights
from clipress.models.load import build
from clipress.models.tiny import tiny_architecture

KINDS = {tower: ("qk", "v", "ffn") for tower in ("image", "text")}
HEADS = {tower: ("heads",) for tower in ("image", "text")}


def found():
    model = build(tiny_architecture(layers=1), 0)
    return [*sites(model, "separate", KINDS), *sites(model, "separate", HEADS)]


def fpgm(rows):
    """The distances of every row to all others, pair by pair."""
    return [sum(np.sqrt(((one - other) ** 2).sum()) for other in rows) for one in rows]


def lamp(rows):
    """Every row's squared norm over those that are not smaller."""
    squares = [(row**2).sum() for row in rows]
    return [square / sum(other for other in squares if other >= square) for square in squares]


def arrays(site):
    """Every unit's weights, taken from the model unit by unit: [groups][units][weights]."""
    part, dims = site.part, site.units
    if site.kind == "ffn":
        first, second = part.linear_in.weight, part.linear_out.weight
        return np.stack([[torch.cat([first[unit], second[:, unit]]).detach().numpy() for unit in range(dims)]])
    attn = part.module
    if site.kind == "heads":
        rows = [attn.v.weight.chunk(attn.heads)[h].flatten() for h in range(attn.heads)]
        columns = [attn.out.weight.T.chunk(attn.heads)[h].flatten() for h in range(attn.heads)]
        return np.stack([[torch.cat(pair).detach().numpy() for pair in zip(rows, columns, strict=True)]])
    first, second = (attn.q.weight, attn.k.weight) if site.kind == "qk" else (attn.v.weight, attn.out.weight.T)
    return np.stack([
        [torch.cat([first[h * dims + d], second[h * dims + d]]).detach().numpy() for d in range(dims)]
        for h in range(site.groups)
    ])  # fmt: skip


def test_the_weights_of_a_unit_are_those_that_produce_or_read_it():
    assert {site.kind for site in found()} == {"qk", "v", "ffn", "heads"}
    for site in found():
        np.testing.assert_array_equal(unit_weights(site).detach().numpy(), arrays(site), err_msg=site.name)


def test_fpgm_is_the_distance_to_the_other_units_of_the_group():
    for site in found():
        expected = np.stack([fpgm(rows.astype(np.float64)) for rows in arrays(site)])
        np.testing.assert_allclose(CRITERIA["fpgm"]().score(site, None).numpy(), expected, rtol=1e-6)


def test_lamp_is_the_share_of_what_is_not_smaller_in_the_layer():
    for site in found():
        rows = arrays(site).astype(np.float64)
        expected = np.asarray(lamp(rows.reshape(-1, rows.shape[-1]))).reshape(rows.shape[:2])
        score = CRITERIA["lamp"]().score(site, None)
        np.testing.assert_allclose(score.numpy(), expected, rtol=1e-9)
        assert score.max() == 1


@pytest.mark.parametrize(("name", "formula"), [("fpgm", fpgm), ("lamp", lamp)])
def test_channels_are_scored_by_the_same_formula(name, formula):
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    expected = formula(weights.double().numpy())
    np.testing.assert_allclose(CRITERIA[name]().score_channels(weights, None).numpy(), expected, rtol=1e-9)


def test_a_copy_of_a_unit_scores_less_than_one_apart_by_fpgm():
    rows = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.1, 1.0], [5.0, 0.0]])
    scores = CRITERIA["fpgm"]().score_channels(rows, None)
    assert scores.argmax() == 3 and scores[0] == scores[1]
