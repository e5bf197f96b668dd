"""Verdicts say whether INT8 and 2:4 pay, and what to keep."""

import pytest

from clipress.bench.compare import Ratio
from clipress.bench.verdict import judged, verdicts

CASES = [("image", 1), ("image", 8), ("text", 1), ("text", 8)]
FASTER, SLOWER = Ratio(1.5, 1.4, 1.6, 20), Ratio(0.9, 0.88, 0.93, 20)


def row(stage, *kinds, size=100, backend="onnxruntime"):
    """Its lineage is the kinds in order; the hash of a record tells all before it."""
    records = [{"hash": "+".join(kinds[: n + 1]), "kind": kind} for n, kind in enumerate(kinds)]
    return {"stage": stage, "backend": backend, "bytes": size, "lineage": records}


@pytest.fixture
def rows():
    return [
        row("teacher", "start"),
        row("recovered", "start", "distill"),
        row("sparse", "start", "distill", "sparsify"),
        row("int8", "start", "distill", "sparsify", "quantize", size=25),
    ]


def ask(rows, ratios):
    """Ratios by row, or by row and case."""
    return verdicts(rows, CASES, lambda origin, name, case: ratios.get((name, case), ratios.get(name)))


def test_each_is_compared_with_the_stage_it_was_made_from(rows):
    asked = []
    verdicts(rows, CASES, lambda origin, name, case: asked.append((origin, name)) or FASTER)
    assert dict.fromkeys(asked) == dict.fromkeys([("recovered", "sparse"), ("sparse", "int8")])


def test_without_its_origin_the_nearest_ancestor_that_was_measured_stands_in(rows):
    (told,) = ask([rows[1], rows[3]], {"int8": FASTER})
    assert (told["stage"], told["against"]) == ("int8", "recovered")
    assert ask([rows[3]], {}) == [] and ask(rows[:2], {}) == []


def test_an_origin_on_another_backend_is_none(rows):
    rows[3]["backend"] = "torch"
    assert [told["stage"] for told in ask(rows, {"sparse": FASTER})] == ["sparse"]


def test_what_is_faster_is_kept(rows):
    told = ask(rows, {"sparse": FASTER, "int8": FASTER})[1]
    assert (told["faster"], told["keep"]) == (True, "int8")
    assert told["text"] == (
        "INT8 is faster here: int8 is 1.50 [1.40, 1.60] times as fast as sparse (image tower, batch 8). Keep int8."
    )


def test_what_is_not_faster_is_said_in_one_line_with_ratio_interval_and_the_artefact_to_keep(rows):
    sparse, int8 = ask(rows, {"sparse": Ratio(1.0, 0.99, 1.01, 20), "int8": SLOWER})
    assert (sparse["faster"], sparse["keep"]) == (False, "recovered")
    assert sparse["text"] == (
        "2:4 is not faster here: sparse is 1.00 [0.99, 1.01] times as fast as recovered (image tower, batch 8). "
        "Keep recovered."
    )
    assert int8["text"].endswith("Keep sparse. int8 is 4.0 times smaller, if size is what counts.")
    assert "\n" not in sparse["text"] + int8["text"]


def test_where_the_cases_differ_the_largest_image_batch_decides_and_the_others_are_named(rows):
    told = ask(rows, {"sparse": SLOWER, "int8": FASTER, ("int8", ("image", 1)): SLOWER})[1]
    assert told["keep"] == "int8" and told["text"].endswith("Keep int8; at image batch 1 it is not faster.")
    told = ask(rows, {"sparse": SLOWER, "int8": SLOWER, ("int8", ("text", 8)): FASTER})[1]
    assert told["keep"] == "sparse" and "int8 is faster at text batch 8." in told["text"]


@pytest.mark.parametrize(
    "ratio, word",
    [
        (Ratio(1.01, 1.005, 1.015, 20), "slower"),  # certain, and too little to matter
        (Ratio(1.2, 0.9, 1.6, 20), "undecided"),
        (Ratio(1.03, 0.99, 1.07, 20), "slower"),
        (Ratio(1.03, 1.01, 1.05, 20), "faster"),
        (Ratio(3.0, None, None, 3), "untold"),
    ],
)
def test_a_gain_must_be_certain_and_matter_and_noise_is_called_noise(rows, ratio, word):
    assert judged(ratio) == word
    (told, _) = ask(rows, {"sparse": ratio, "int8": FASTER})
    assert told["faster"] == {"slower": False, "faster": True}.get(word)
    assert (told["keep"] is None) == (word in ("undecided", "untold"))
