"""`clipress eval`: metrics with standard errors, paired differences, a linear probe and a results file."""

import json

import numpy as np
import pytest
from helpers import clipress

from clipress.metrics.outcomes import paired_difference, percents, read_outcomes, standard_errors


def lines(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return {line.split()[0]: line for line in result.output.splitlines() if "/" in line.split(" ")[0]}


def test_metrics_are_printed_with_standard_errors(tiny_run):
    printed_lines = lines(clipress("eval", tiny_run[0], "--stage", "recovered"))
    assert {"digits/top1", "digits/mean_per_class_recall", "scenes/text_r1", "scenes/mean_r1"} <= printed_lines.keys()
    assert all(" ± " in line and "[" not in line for line in printed_lines.values())


def test_an_artifact_does_not_differ_from_itself(tiny_run):
    printed_lines = lines(clipress("eval", tiny_run[0], "--stage", "teacher", "--compare", "teacher"))
    assert all(line.endswith("+0.00 [+0.00, +0.00]") for line in printed_lines.values())


def test_two_stages_are_compared_and_the_file_matches_the_output(tiny_run, tmp_path):
    out = tmp_path / "figures.json"
    printed_lines = lines(
        clipress("eval", tiny_run[0], "--stage", "int8", "--compare", "teacher", "--linear-probe", "--json", out)
    )
    written = json.loads(out.read_text())
    assert (written["stage"], written["compare"], written["conditions"]["split"]) == ("int8", "teacher", "test")
    assert {"digits/lp_top1", "digits/lp_mean_per_class_recall"} <= printed_lines.keys() == written["metrics"].keys()
    for key, found in written["metrics"].items():
        low, high = found["interval"]
        assert low <= found["difference"] <= high and found["se"] >= 0
        printed = (
            f"{found['percent']:6.2f} ± {found['se']:4.2f} %   {found['difference']:+6.2f} [{low:+.2f}, {high:+.2f}]"
        )
        assert printed_lines[key].endswith(printed)
    assert written["metrics"]["digits/lp_top1"]["percent"] > 25  # Chance level is 10.


def test_bench_writes_the_outcome_of_every_item(tiny_run):
    run, _ = tiny_run
    rows = json.loads((run / "bench" / "results.json").read_text())["rows"]
    items = {row["stage"]: read_outcomes(run / "bench" / "items" / f"{row['stage']}.npz") for row in rows}
    for row in rows:
        found = items[row["stage"]]
        assert percents(found) == pytest.approx(row["accuracy"], abs=1e-3)
        assert standard_errors(found) == pytest.approx(row["accuracy_se"], abs=1e-3)
    key, first, last = "scenes/image_r5", items["teacher"], items["int8"]
    wanted = 100 * (np.mean(first[key].values) - np.mean(last[key].values))
    assert paired_difference(first[key], last[key]).value == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--compare", "teachr"), ("--compare teachr", "Did you mean 'teacher'")),
        (("--stage", "prund"), ("--stage prund", "Did you mean 'pruned'")),
        (("--split", "train"), ("'train' is not one of",)),
    ],
)
def test_a_user_error_is_one_message(tiny_run, options, words):
    result = clipress("eval", tiny_run[0], *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    for word in words:
        assert word in result.output
