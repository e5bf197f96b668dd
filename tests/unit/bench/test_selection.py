"""Verdicts: whether INT8 and 2:4 pay off, and which artifact to keep."""

import json
from types import SimpleNamespace

import pytest

from clipress.bench import selection
from clipress.bench.compare import Ratio
from clipress.bench.results import Case, Conditions, Results, Row, read_kept, write_results
from clipress.bench.selection import choose_kept, choose_runtime, judge, verdicts
from clipress.runtime.cpu import Processor

CASES = [Case("image", 1), Case("image", 8), Case("text", 1), Case("text", 8)]
FASTER, SLOWER = Ratio(1.5, 1.4, 1.6, 20), Ratio(0.9, 0.88, 0.93, 20)


def row(stage, *kinds, size=100, backend="onnxruntime", **accuracy):
    """Return a row whose lineage has these kinds; a record's hash covers all earlier ones."""
    records = [{"hash": "+".join(kinds[: n + 1]), "kind": kind} for n, kind in enumerate(kinds)]
    return Row(
        stage=stage,
        artifact=stage.partition(" ")[0],
        backend=backend,
        precision="fp32",
        bytes=size,
        lineage=records,
        accuracy={f"digits/{key}": value for key, value in accuracy.items()},
    )


def changed(row, **fields):
    return row.model_copy(update=fields)


@pytest.fixture
def rows():
    return [
        row("teacher", "start"),
        row("recovered", "start", "distill"),
        row("sparse", "start", "distill", "sparsify"),
        row("int8", "start", "distill", "sparsify", "quantize", size=25),
    ]


def verdicts_for(rows, ratios, max_accuracy_drop=1.0):
    """Return the verdicts for ratios given by row, or by row and case."""
    return verdicts(
        rows, CASES, lambda origin, name, case: ratios.get((name, case), ratios.get(name)), max_accuracy_drop
    )


def test_an_artifact_is_compared_with_its_parent(rows):
    compared = []
    verdicts(rows, CASES, lambda origin, name, case: compared.append((origin, name)) or FASTER, 1.0)
    assert dict.fromkeys(compared) == dict.fromkeys([("recovered", "sparse"), ("sparse", "int8")])


def test_without_its_parent_the_nearest_measured_ancestor_is_the_baseline(rows):
    (verdict,) = verdicts_for([rows[1], rows[3]], {"int8": FASTER})
    assert (verdict.stage, verdict.against) == ("int8", "recovered")
    assert verdicts_for([rows[3]], {}) == [] and verdicts_for(rows[:2], {}) == []


def test_a_parent_on_another_backend_does_not_count(rows):
    rows[3] = changed(rows[3], backend="torch")
    assert [verdict.stage for verdict in verdicts_for(rows, {"sparse": FASTER})] == ["sparse"]


def test_the_faster_artifact_is_kept(rows):
    verdict = verdicts_for(rows, {"sparse": FASTER, "int8": FASTER})[1]
    assert (verdict.faster, verdict.keep, verdict.loss) == (True, "int8", None)  # Accuracy was not measured.
    assert verdict.text == (
        "INT8 is faster here: int8 is 1.50 [1.40, 1.60] times as fast as sparse (image tower, batch 8). Keep int8."
    )


def test_a_slower_artifact_is_reported_with_ratio_interval_and_what_to_keep(rows):
    sparse, int8 = verdicts_for(rows, {"sparse": Ratio(0.98, 0.97, 0.99, 20), "int8": SLOWER})
    assert (sparse.faster, sparse.keep) == (False, "recovered")
    assert sparse.text == (
        "2:4 is not faster here: sparse is 0.98 [0.97, 0.99] times as fast as recovered (image tower, batch 8). "
        "Keep recovered."
    )
    assert int8.text.endswith("Keep sparse. int8 is 4.0 times smaller, if size is what counts.")
    assert "\n" not in sparse.text + int8.text


def test_the_largest_image_batch_decides_and_differing_cases_are_named(rows):
    verdict = verdicts_for(rows, {"sparse": SLOWER, "int8": FASTER, ("int8", ("image", 1, 0)): SLOWER})[1]
    assert verdict.keep == "int8" and verdict.text.endswith("Keep int8; at image batch 1 it is not faster.")
    verdict = verdicts_for(rows, {"sparse": SLOWER, "int8": SLOWER, ("int8", ("text", 8, 0)): FASTER})[1]
    assert verdict.keep == "sparse" and "int8 is faster at text batch 8." in verdict.text


@pytest.mark.parametrize(
    "ratio, word",
    [
        (Ratio(1.01, 1.005, 1.015, 20), "slower"),  # Significant, but too small to matter.
        (Ratio(1.2, 0.9, 1.6, 20), "undecided"),
        (Ratio(1.03, 0.99, 1.07, 20), "same"),
        (Ratio(0.97, 0.94, 1.0, 20), "same"),
        (Ratio(0.95, 0.92, 0.99, 20), "slower"),
        (Ratio(1.03, 1.01, 1.05, 20), "faster"),
        (Ratio(3.0, None, None, 3), "unknown"),
    ],
)
def test_a_gain_must_be_significant_and_large_enough(rows, ratio, word):
    assert judge(ratio) == word
    (verdict, _) = verdicts_for(rows, {"sparse": ratio, "int8": FASTER})
    assert verdict.faster == {"slower": False, "faster": True}.get(word)
    assert (verdict.keep is None) == (word in ("undecided", "unknown"))


SAME, NOISE = Ratio(1.0, 0.99, 1.01, 20), Ratio(1.2, 0.9, 1.6, 20)


def test_an_interval_with_1_in_it_names_no_winner_and_the_simpler_row_is_kept(rows):
    sparse, int8 = verdicts_for(rows, {"sparse": SAME, "int8": SAME})
    assert (sparse.faster, sparse.keep) == (None, "recovered")
    assert sparse.text == (
        "2:4, no difference seen here: sparse is 1.00 [0.99, 1.01] times as fast as recovered (image tower, batch 8). "
        "Keep recovered, the simpler one."
    )
    assert int8.text.endswith("Keep sparse, the simpler one. int8 is 4.0 times smaller, if size is what counts.")
    (kept,) = choose_kept(rows, [sparse, int8])
    assert kept.text == ("Kept on onnxruntime: recovered, not int8 (to serve that: --stage int8); no difference seen.")


def test_a_wide_interval_with_1_in_it_leaves_the_recipes_choice_and_says_so(rows):
    _, verdict = found = verdicts_for(rows, {"sparse": FASTER, "int8": NOISE})
    assert (verdict.faster, verdict.keep) == (None, None)
    assert verdict.text.startswith("INT8, no difference seen here: int8 is 1.20 [0.90, 1.60] times as fast as sparse")
    assert verdict.text.endswith("measure longer, or when it is quiet. Until then int8 stays.")
    assert choose_kept(rows, found)[0].text == "Kept on onnxruntime: int8; no difference seen."


@pytest.mark.parametrize(
    ("top1", "max_accuracy_drop", "keep"), [(88.9, 1.0, "sparse"), (89.1, 1.0, "int8"), (80, 10, "int8")]
)
def test_the_faster_artifact_is_kept_only_within_the_allowed_accuracy_drop(top1, max_accuracy_drop, keep):
    rows = [
        row("sparse", "start", "sparsify", top1=90.0, text_r1=50.0, top5=99.0),
        row("int8", "start", "sparsify", "quantize", top1=top1, text_r1=50.5, top5=10.0),
    ]
    (verdict,) = verdicts_for(rows, {"int8": FASTER}, max_accuracy_drop)
    assert (verdict.faster, verdict.keep, verdict.loss) == (True, keep, pytest.approx(90 - top1))
    assert ("Keep sparse: int8 loses 1.1 points of digits/top1, bench.max_accuracy_drop allows 1." in verdict.text) == (
        keep == "sparse"
    )


@pytest.mark.parametrize(
    ("sparse", "int8", "keep"),
    [
        (FASTER, FASTER, "int8"),
        (SLOWER, FASTER, "int8"),  # The INT8 artifact was made from the sparse one.
        (FASTER, SLOWER, "sparse"),
        (SLOWER, SLOWER, "recovered"),
        (NOISE, SLOWER, "sparse"),
        (SLOWER, NOISE, "int8"),  # Undecided steps stay as in the recipe.
    ],
)
def test_steps_that_do_not_pay_are_undone_back_to_a_dense_float_artifact(rows, sparse, int8, keep):
    (found,) = choose_kept(rows, verdicts_for(rows, {"sparse": sparse, "int8": int8}))
    assert (found.backend, found.artifact, found.of) == ("onnxruntime", keep, "int8")
    assert ("--stage int8" in found.text) == (keep != "int8")


def test_each_backend_has_its_own_choice_and_names_the_artifact_not_the_row():
    kinds = {"sparse": ("start", "sparsify"), "int8": ("start", "sparsify", "quantize")}
    rows = [row(f"{name} ({b})", *own, backend=b) for b in ("onnxruntime", "torch") for name, own in kinds.items()]
    found = choose_kept(rows, verdicts_for(rows, {"int8 (onnxruntime)": FASTER, "int8 (torch)": SLOWER}))
    assert [(one.backend, one.artifact) for one in found] == [("onnxruntime", "int8"), ("torch", "sparse")]


def across(ratio, top1=(90.0, 90.0), kinds=("start",)):
    """Measure one artifact in two runtimes. Returns the verdicts and what is kept."""
    backends = ("onnxruntime", "openvino")
    rows = [
        row(f"dense ({name})", *kinds, backend=name, top1=one) for name, one in zip(backends, top1, strict=True)
    ] + [row("dense (torch)", *kinds, backend="torch")]
    return choose_runtime(rows, choose_kept(rows, []), CASES, lambda *_: ratio, 1.0)


@pytest.mark.parametrize(
    ("ratio", "preferred", "said"),
    [
        (FASTER, "openvino", "openvino is faster here: dense (openvino) is 1.50 [1.40, 1.60] times as fast as "),
        (SLOWER, "onnxruntime", "openvino is not faster here: "),
        (SAME, "onnxruntime", "Keep dense (onnxruntime), the first one."),
        (NOISE, "onnxruntime", "Until then dense (onnxruntime) stays."),
    ],
)
def test_of_two_runtimes_the_faster_one_is_preferred_and_without_a_difference_the_first(ratio, preferred, said):
    (verdict,), kept = across(ratio)
    assert verdict.method == "openvino" and said in verdict.text
    assert {one.backend: one.preferred for one in kept} == {
        name: name == preferred for name in ("onnxruntime", "openvino")
    }
    assert all((one.artifact, one.of) == ("dense", "dense") for one in kept)


def test_a_faster_runtime_that_loses_accuracy_is_not_preferred():
    (verdict,), kept = across(FASTER, top1=(90.0, 88.0))
    assert verdict.loss == 2.0 and [one.preferred for one in kept] == [True, False]


def test_runtimes_are_compared_by_what_each_keeps(rows):
    rows = [changed(one, stage=f"{one.stage} ({b})", backend=b) for b in ("onnxruntime", "openvino") for one in rows]
    ratios = {"sparse": FASTER, "int8 (onnxruntime)": SLOWER, "int8 (openvino)": FASTER}
    kept, asked = choose_kept(rows, verdicts_for(rows, ratios)), []
    found, chosen = choose_runtime(rows, kept, CASES, lambda *where: asked.append(where[:2]) or FASTER, 1.0)
    assert set(asked) == {("sparse (onnxruntime)", "int8 (openvino)")} and len(found) == 1
    assert [(one.artifact, one.preferred) for one in chosen] == [("sparse", False), ("int8", True)]


def test_one_runtime_is_compared_with_nothing(rows):
    assert choose_runtime(rows, [], CASES, lambda *_: FASTER, 1.0) == ([], [])


def test_a_dense_float_run_has_no_verdict(rows):
    assert choose_kept(rows[:2], verdicts_for(rows[:2], {})) == []


@pytest.fixture
def run(rows, tmp_path):
    """A run whose results recommend the sparse artifact."""
    for one in rows:
        header = {key: {} for key in ("architecture", "shapes", "preprocess", "tokenizer")}
        (tmp_path / one.stage).mkdir()
        lineage = [{**record.model_dump(), "stage": one.stage} for record in one.lineage]
        header |= {"schema_version": 1, "lineage": lineage, "weights_sha256": ""}
        (tmp_path / one.stage / "clipress.json").write_text(json.dumps(header))
    kept = choose_kept(rows, verdicts_for(rows, {"sparse": FASTER, "int8": SLOWER}))
    write_results(Results(schema_version=1, conditions=Conditions(), rows=rows, kept=kept), tmp_path)
    return tmp_path


def test_the_kept_artifact_is_read_back(run):
    kept = read_kept(run / "results.json", run, "int8")
    assert (kept.artifact, kept.backend) == ("sparse", "onnxruntime")
    assert read_kept(run / "results.json", run, "int8", "onnxruntime") == kept
    assert read_kept(run / "results.json", run, "int8", "tensorrt") is None
    assert read_kept(run / "none.json", run, "int8") is None


@pytest.mark.parametrize("changed", ["sparse", "int8"])
def test_results_of_replaced_artifacts_are_ignored(run, changed):
    header = run / changed / "clipress.json"
    header.write_text(header.read_text().replace('"hash": "start+', '"hash": "other+'))
    assert read_kept(run / "results.json", run, "int8") is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"kept": [{}]}', '{"kept": 3}'])
def test_malformed_results_keep_nothing(run, content):
    (run / "results.json").write_text(content)
    assert read_kept(run / "results.json", run, "int8") is None


OLD, NEW = Processor("Old", "x86_64", 2, ("avx2",)), Processor("New", "x86_64", 2, ("avx2", "avx512f", "avx512_vnni"))


@pytest.mark.parametrize(
    ("cpu", "ratio", "exact", "why"),
    [
        (OLD, SLOWER, False, "INT8 gains less here than elsewhere: this CPU has no VNNI instructions (avx2)."),
        (OLD, SLOWER, True, "It ran in ONNX Runtime's exact mode, since it has 8-bit weights and this CPU has no VNNI"),
        (OLD, FASTER, True, "quantize with portable: true to run at full speed."),
        (OLD, FASTER, False, ""),
        (NEW, SLOWER, False, ""),
    ],
)
def test_a_verdict_on_int8_explains_the_role_of_the_cpu(rows, cpu, ratio, exact, why):
    (verdict,) = verdicts([rows[2], changed(rows[3], exact_mode=exact)], CASES, lambda *_: ratio, 1.0, cpu)
    assert why in verdict.text and ("VNNI" in verdict.text) == bool(why)
    assert verdict.keep == ("int8" if ratio is FASTER else "sparse")


def test_verdicts_on_sparsity_or_other_backends_do_not_mention_the_cpu(rows):
    verdict = verdicts(rows, CASES, lambda *_: SLOWER, 1.0, OLD)
    assert [("VNNI" in one.text) for one in verdict] == [False, True]
    rows = [changed(one, backend="torch") for one in rows]
    assert all("VNNI" not in one.text for one in verdicts(rows, CASES, lambda *_: SLOWER, 1.0, OLD))


def test_the_task_defines_the_deciding_graph_and_the_metrics_that_count(monkeypatch):
    task = SimpleNamespace(main_graph="question", figures=("/answers",))
    monkeypatch.setattr(selection, "task_named", lambda name: {"vqa": task}[name])
    rows = [
        changed(row("dense", "start", answers=70.0, top1=90.0), task="vqa"),
        changed(row("int8", "start", "quantize", answers=69.5, top1=10.0), task="vqa"),
    ]
    cases = [Case("image", 64), Case("question", 1), Case("question", 8)]
    (verdict,) = verdicts(rows, cases, lambda *where: FASTER if where[-1].graph == "question" else SLOWER, 1.0)
    assert (verdict.keep, verdict.loss) == ("int8", 0.5)
    assert "(question tower, batch 8). Keep int8; at image batch 64 it is not faster." in verdict.text
