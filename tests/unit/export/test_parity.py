"""Two implementations of a graph agree, or the comparison says how far they differ."""

import numpy as np
import pytest

from clipress.errors import ExportError
from clipress.export import parity
from clipress.runtime.graph import Graph, Input, Output, clip_graphs

RNG = np.random.default_rng(0)
QUESTION = Graph(
    name="question",
    inputs=(
        Input(name="question_ids", dtype="int64", shape=(5,)),
        Input(name="states", dtype="float32", shape=(7, 4)),
    ),
    outputs=(Output(name="answer_logits", shape=(6,)), Output(name="hidden", shape=(5, 4))),
    agrees="logits",
)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def compared(graphs, samples, precision="fp32", **given):
    return parity.Comparison(graphs, samples, precision, {name: f"{name}.onnx" for name in graphs}, **given)


@pytest.mark.parametrize("broken_at", [1, 3, 10])
def test_a_file_that_is_wrong_at_a_single_batch_size_is_refused(broken_at):
    graphs = {"image": clip_graphs(2, 3, 4)["image"]}
    what = compared(graphs, {"image": {"pixel_values": RNG.standard_normal((10, 4))}})

    def encode(inputs):
        return {"image_embeds": unit(inputs["pixel_values"])}

    def candidate(inputs):
        rows = encode(inputs)["image_embeds"]
        return {"image_embeds": -rows if len(rows) == broken_at else rows}

    assert parity.compare(what, {"image": encode}, {"image": encode}) == {"image_min_cosine": pytest.approx(1)}
    with pytest.raises(ExportError, match=r"image\.onnx does not agree.*least cosine -1\.0"):
        parity.compare(what, {"image": encode}, {"image": candidate})


def test_a_file_with_a_fixed_batch_is_refused():
    graphs = {"image": clip_graphs(2, 3, 4)["image"]}
    what = compared(graphs, {"image": {"pixel_values": RNG.standard_normal((10, 4))}})
    all_rows = unit(what.samples["image"]["pixel_values"])
    reference = {"image": lambda inputs: {"image_embeds": unit(inputs["pixel_values"])}}
    with pytest.raises(ExportError, match=r"expected image_embeds of shape \(1, 4\) for a batch of 1, found \(10, 4\)"):
        parity.compare(what, reference, {"image": lambda _: {"image_embeds": all_rows}})


def test_rankings_between_two_graphs_of_embeddings_are_compared():
    graphs, eye = clip_graphs(2, 3, 8), np.eye(8)
    samples = {"image": {"pixel_values": eye + 0.1}, "text": {"input_ids": eye}}
    reference = {
        "image": lambda inputs: {"image_embeds": inputs["pixel_values"]},
        "text": lambda inputs: {"text_embeds": inputs["input_ids"] + 0.1},
    }
    what = compared(graphs, samples)
    figures = parity.compare(what, reference, reference)
    assert figures.keys() == {"image_min_cosine", "text_min_cosine", "same_first_place"}
    assert figures["same_first_place"] == 1


def test_same_first_place_counts_queries_both_ways():
    eye = np.eye(4)
    swapped = eye[[1, 0, 2, 3]]
    assert parity.same_first([eye, eye], [eye, eye], 1e-6) == 1.0
    assert parity.same_first([eye, eye], [eye, swapped], 1e-6) == 0.5  # Two of four rows, two of four columns.
    assert parity.same_first([eye, eye], [eye, swapped], 1.0) == 1.0  # Scores this far apart count as equal.


def test_the_largest_logit_matches_up_to_ties_at_any_scale():
    wanted = np.array([[0.0, 1.0, 0.999], [3.0, 0.0, 1.0]])
    swapped = wanted[:, [0, 2, 1]]
    for scale in (1e-3, 1.0, 1e3):
        assert parity.same_class(scale * wanted, scale * wanted, 0.0) == 1.0
        assert parity.same_class(scale * wanted, scale * swapped, 1e-5) == 0.5
        assert parity.same_class(scale * wanted, scale * swapped, 2e-3) == 1.0


def answer(inputs):
    weights = np.random.default_rng(1).standard_normal((28, 6))
    states = inputs["states"]
    hidden = inputs["question_ids"][..., None] + states.mean(1, keepdims=True)
    return {"answer_logits": states.reshape(len(states), -1) @ weights, "hidden": hidden}


@pytest.fixture
def question():
    """A graph with two inputs and two outputs, and its samples."""
    return compared({"question": QUESTION}, {"question": QUESTION.example(9)})


def test_a_graph_of_logits_is_compared_by_cosine_and_first_place_on_all_its_inputs(question):
    figures = parity.compare(question, {"question": answer}, {"question": answer})
    assert figures == {"question_min_cosine": pytest.approx(1), "question_same_first_place": 1}


def test_close_logits_with_another_first_place_are_refused(question):
    def candidate(inputs):
        found = answer(inputs)
        order = np.argsort(found["answer_logits"])
        rows = np.arange(len(order))
        found["answer_logits"][rows, order[:, -2]] = found["answer_logits"].max(1) + 1e-3
        return found

    loose = parity.Limits(0.5, 0.95, 1e-5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ExportError, match=r"question\.onnx ranks differently"):
        patch.setitem(parity.LIMITS, "fp32", loose)
        parity.compare(question, {"question": answer}, {"question": candidate})


def test_every_output_is_compared(question):
    def candidate(inputs):
        found = answer(inputs)
        return found | {"hidden": -found["hidden"]}

    with pytest.raises(ExportError, match=r"question\.onnx does not agree.*least cosine -"):
        parity.compare(question, {"question": answer}, {"question": candidate})


@pytest.mark.parametrize("broken_at", [1, 9])
@pytest.mark.parametrize("output", ["answer_logits", "hidden"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_refused_at_any_batch_size(question, output, broken_at, bad):
    def candidate(inputs):
        found = answer(inputs)
        if len(inputs["states"]) == broken_at:
            found[output][0] = bad
        return found

    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ExportError, match=r"question\.onnx does not agree.*least cosine nan"),
    ):
        parity.compare(question, {"question": answer}, {"question": candidate})


@pytest.mark.parametrize(
    ("shift", "words"), [(0.5, r"y differs from the source model by 0\.5 \(limit 0\.1\)"), (np.nan, "nan")]
)
def test_outputs_beyond_their_limits_are_refused(shift, words):
    cases = [{"x": np.ones((batch, 2))} for batch in (1, 3)]
    run = lambda inputs: {"y": inputs["x"]}  # noqa: E731
    assert parity.compare_outputs(lambda: run, lambda: run, cases, {"y": 0.1}, "f.onnx") == {"y_max_difference": 0}
    with pytest.raises(ExportError, match=words):
        parity.compare_outputs(
            lambda: run, lambda: lambda inputs: {"y": inputs["x"] + shift}, cases, {"y": 0.1}, "f.onnx"
        )
    with pytest.raises(ExportError, match="its batch is not dynamic"):
        parity.compare_outputs(lambda: run, lambda: lambda _: {"y": np.ones((1, 2))}, cases, {"y": 0.1}, "f.onnx")


@pytest.mark.parametrize(
    ("cosines", "words"), [([0.994] + [1.0] * 199, "least cosine"), ([0.998] * 200, "mean cosine")]
)
def test_int8_may_round_apart_in_single_samples_but_not_on_average(cosines, words):
    """Rounding between two levels can go either way in two implementations; a wrong file is wrong everywhere."""
    graphs = {"image": QUESTION}
    angles = np.arccos(np.asarray(cosines))
    turned = np.stack([np.cos(angles), np.sin(angles)], 1)
    straight = np.tile([1.0, 0.0], (len(angles), 1))
    what = parity.Comparison(graphs, {"image": {"x": straight}}, "int8", {"image": "image.onnx"}, batches=())

    def least(found):
        return parity._least_cosine(what, "image", None, {"y": straight}, {"y": found})

    with pytest.raises(ExportError, match=words):
        least(turned)
    mostly = np.concatenate([turned[:1], straight[1:]]) if words == "mean cosine" else straight
    assert least(mostly) >= 0.998


@pytest.mark.parametrize(("changed", "holds"), [(0.9975, True), (0.9985, False), (1.0, False)])
def test_int8_may_round_apart_by_as_much_as_rounding_changes_at_all(changed, holds):
    """In a deep tower one value that rounds the other way moves others, until the two are two independent roundings."""
    rows = np.tile([1.0, 0.0], (200, 1))

    def turned(cosine):
        return np.tile([cosine, np.sqrt(1 - cosine**2)], (200, 1))

    plain = {"image": lambda inputs: {"y": turned(changed)[: len(inputs["x"])]}}
    what = parity.Comparison(
        {"image": QUESTION}, {"image": {"x": rows}}, "int8", {"image": "image.onnx"}, (), unquantized=plain
    )
    if holds:
        assert parity._least_cosine(what, "image", None, {"y": rows}, {"y": turned(0.998)}) == pytest.approx(0.998)
        return
    with pytest.raises(ExportError, match=r"mean cosine 0\.998"):
        parity._least_cosine(what, "image", None, {"y": rows}, {"y": turned(0.998)})


@pytest.mark.parametrize(("moved", "holds"), [(0.01, True), (0.001, False)])
def test_scores_that_rounding_moves_past_each_other_count_as_equal(moved, holds):
    """Every text has a twin whose scores are 0.006 lower, and the file puts the twin first."""
    graphs, texts = clip_graphs(2, 3, 8), np.repeat(np.eye(8), 2, axis=0)
    low = texts * (1 - 0.006 * (np.arange(16) % 2))[:, None]
    swapped = low.reshape(8, 2, 8)[:, ::-1].reshape(16, 8)
    samples = {"image": {"pixel_values": np.eye(8)}, "text": {"input_ids": low}}
    image = lambda inputs: {"image_embeds": inputs["pixel_values"]}  # noqa: E731
    reference = {"image": image, "text": lambda inputs: {"text_embeds": inputs["input_ids"]}}
    found = {"image": image, "text": lambda inputs: {"text_embeds": swapped[: len(inputs["input_ids"])]}}
    # Without rounding a text of the reference has this much more of every image, or less.
    signs = np.where(np.arange(16) % 2, 1.0, -1.0)[:, None]
    plain = {"image": image, "text": lambda _: {"text_embeds": low + moved * signs}}
    what = compared(graphs, samples, "int8", unquantized=plain)
    if holds:
        assert parity.compare(what, reference, found)["same_first_place"] == 1
        return
    with pytest.raises(ExportError, match="the first place is the same for 66"):
        parity.compare(what, reference, found)


def test_no_more_samples_than_fit_in_memory_are_run_at_once():
    graphs, seen = {"image": clip_graphs(2, 3, 4)["image"]}, []
    what = compared(graphs, {"image": {"pixel_values": RNG.standard_normal((2 * parity.AT_ONCE + 1, 4))}})

    def encode(inputs):
        seen.append(len(inputs["pixel_values"]))
        return {"image_embeds": unit(inputs["pixel_values"])}

    def wrong_at_the_end(inputs):
        rows = unit(inputs["pixel_values"])
        return {"image_embeds": -rows if len(rows) == 1 and (rows == last).all() else rows}

    last = unit(what.samples["image"]["pixel_values"])[-1:]
    parity.compare(what, {"image": encode}, {"image": encode})
    assert max(seen) == parity.AT_ONCE and sum(seen) == 2 * (2 * parity.AT_ONCE + 1) + 1 + 3
    with pytest.raises(ExportError, match=r"least cosine -1\.0"):
        parity.compare(what, {"image": encode}, {"image": wrong_at_the_end})
