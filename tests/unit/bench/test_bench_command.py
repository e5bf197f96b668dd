"""`clipress bench`: comparisons, gates, written files and user mistakes."""

import json
import shutil

import numpy as np
import pytest
from helpers import clipress

from clipress.bench.compare import speed_up
from clipress.bench.latency import Timings, summary

QUICK = ("--no-accuracy", "--duration", 0, "--iterations", 7, "--warm-up", 0, "--batch", 1)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def compared(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    result = clipress("bench", tiny_run[0], "--stage", "sparse", "--stage", "int8", *QUICK, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_stages_of_a_run_are_compared_with_the_first_one_named(compared):
    folder, output = compared
    results = results_of(folder)
    assert [row["stage"] for row in results["rows"]] == ["sparse", "int8"]
    for row in results["rows"]:
        assert row["accuracy"] == {}
        for timing in row["latency"]:
            assert timing["speed_up_low"] <= timing["speed_up"] <= timing["speed_up_high"]
    assert all(timing["speed_up"] == 1 for timing in results["rows"][0]["latency"])
    assert "speed-up: against sparse, 7 rounds or more" in output and "95 %" in output


def test_the_saved_samples_reproduce_the_figures(compared):
    folder, _ = compared
    results = results_of(folder)
    held = {}
    for row in results["rows"]:
        content = json.loads((folder / "samples" / f"{row['stage']}.json").read_text())
        assert content["stage"] == row["stage"]
        for case, timing in zip(content["cases"], row["latency"], strict=True):
            assert [case[key] for key in ("tower", "batch", "ids")] == [
                timing[key] for key in ("tower", "batch", "ids")
            ]
            assert len(case["latency_ms"]) == sum(case["rounds"]) == timing["iterations"] == 7
            own = Timings(np.array(case["latency_ms"]), np.array(case["rounds"]), np.array(case["starts_ms"]))
            again = summary(own, case["batch"])
            assert again["p99_ms"] == pytest.approx(timing["p99_ms"], abs=2e-5)  # Milliseconds are rounded.
            assert again["rounds"] == timing["rounds"]
            held[row["stage"], case["tower"], case["ids"]] = own
    ratio = speed_up(held["sparse", "text", 0], held["int8", "text", 0])
    assert ratio.value == pytest.approx(results["rows"][1]["latency"][1]["speed_up"], rel=1e-3)


def test_conditions_record_the_machine_and_versions(compared):
    known = results_of(compared[0])["conditions"]
    assert known["threads"] == 1 and known["duration_ms"] == 0 and known["iterations_at_least"] == 7
    assert known["cpu_affinity"] == "not known" or len(known["cpu_affinity"]) == 1
    assert known["command"].startswith("clipress bench ") and "--stage sparse --stage int8" in known["command"]
    assert known["backends"] == ["onnxruntime"] and known["turn_ms"] == 0


def test_a_verdict_follows_from_the_sampled_times_and_is_printed(compared):
    folder, output = compared
    (verdict,) = results_of(folder)["verdicts"]
    assert (verdict["stage"], verdict["against"], verdict["method"]) == ("int8", "sparse", "INT8")
    medians = {}
    for stage in ("sparse", "int8"):
        case = json.loads((folder / "samples" / f"{stage}.json").read_text())["cases"][0]
        turns = np.split(np.array(case["latency_ms"]), np.cumsum(case["rounds"])[:-1])
        medians[stage] = [np.median(turn) for turn in turns]
    logs = np.log(np.array(medians["sparse"]) / medians["int8"])
    averages = averages_of(logs)
    # Of 28 averages, 2 lie outside the interval on each side.
    ratio, low, high = np.exp([np.median(averages), averages[2], averages[-3]])
    assert verdict["cases"][0]["speed_up"] == pytest.approx(ratio, rel=1e-3)
    faster = None if low <= 1 <= high else low > 1 and ratio >= 1.02
    keep = "int8" if faster else None if faster is None and high > 1.1 else "sparse"
    assert (verdict["faster"], verdict["keep"]) == (faster, keep)
    said = {True: "INT8 is faster here", False: "INT8 is not faster here", None: "INT8, no difference seen here"}
    assert said[faster] in " ".join(output.split())


def averages_of(logs):
    """Return the averages of all pairs of rounds, sorted."""
    return sorted((a + b) / 2 for i, a in enumerate(logs) for b in logs[i:])


def test_runs_are_compared_by_their_last_artifacts_and_duplicates_get_distinct_names(tiny_run, tmp_path):
    run, _ = tiny_run
    shutil.copytree(run, tmp_path / "other")
    result = clipress("bench", run, tmp_path / "other", run, *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [row["stage"] for row in results_of(tmp_path / "out")["rows"]] == ["run/int8", "other/int8", "run/int8 #2"]
    names = {path.name for path in (tmp_path / "out" / "samples").iterdir()}
    assert names == {"run-int8.json", "other-int8.json", "run-int8-2.json"}


def test_two_runners_are_two_rows_of_one_table(tiny_run, tmp_path):
    result = clipress(
        "bench",
        tiny_run[0],
        "--stage",
        "pruned",
        "--runner",
        "onnxruntime",
        "--runner",
        "torch",
        *QUICK[1:],
        "--out",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    first, second = results_of(tmp_path)["rows"]
    assert (first["stage"], second["stage"]) == ("pruned (onnxruntime)", "pruned (torch)")
    assert first["accuracy"] == pytest.approx(second["accuracy"], abs=5)
    assert second["device"] and (tmp_path / "items" / "pruned-torch.npz").is_file()


def test_a_comparison_does_not_change_the_results_of_its_runs(tiny_run):
    run, _ = tiny_run
    before = (run / "bench" / "results.json").read_bytes()
    assert clipress("bench", run, "--stage", "pruned", *QUICK).exit_code == 0
    assert (run / "bench" / "results.json").read_bytes() == before
    assert (run / "bench" / "compared" / "results.json").is_file()
    shutil.rmtree(run / "bench" / "compared")


def test_every_failed_gate_is_a_message_and_the_exit_code_is_1(tiny_run, tmp_path):
    gates = ("--fail-if", "p99_ms{tower=text, ids=24} > 0", "--fail-if", "bytes < 1", "--fail-if", "params > 1")
    result = clipress("bench", tiny_run[0], "--stage", "int8", *QUICK, *gates, "--out", tmp_path)
    assert result.exit_code == 1, result.output
    broken = [line for line in result.output.splitlines() if line.startswith("Broken: ")]
    assert len(broken) == 2 and "p99_ms is" in broken[0] and "params is" in broken[1]
    assert (tmp_path / "results.json").is_file()


def test_gates_that_hold_end_with_exit_code_0(tiny_run, tmp_path):
    gates = ("--fail-if", "p99_ms > 1e9", "--fail-if", "bytes{stage=int8} < 1")
    assert clipress("bench", tiny_run[0], "--stage", "int8", *QUICK, *gates, "--out", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (("--fail-if", "p98_ms > 1"), "Did you mean 'p9"),
        (("--fail-if", "p99_ms{stage=int9} > 1"), "Did you mean 'int8'"),
        (("--fail-if", "p99_ms"), "METRIC OP NUMBER"),
        (("--runner", "tochr"), "Did you mean 'torch'"),
        (("--stage", "int9"), "Did you mean 'int8'"),
        (("--cpus", "a"), "--cpus a"),
        (("--cpus", "4096"), "CPU 4096"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_measured(tiny_run, tmp_path, options, words):
    result = clipress("bench", tiny_run[0], *QUICK, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2 and words in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()


def test_a_file_is_not_a_run_folder(tiny_run):
    result = clipress("bench", tiny_run[0] / "export" / "int8" / "image.onnx")
    assert result.exit_code == 2 and "is not a run folder: it is a file" in result.output


def test_an_artifact_that_is_missing_is_one_message(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "int8")
    result = clipress("bench", tmp_path / "run", *QUICK)
    assert result.exit_code == 2 and "no clipress.json" in result.output and "Traceback" not in result.output


def test_options_may_come_before_the_run(tiny_run, tmp_path):
    result = clipress("bench", *QUICK, "--stage", "int8", "--out", tmp_path, tiny_run[0])
    assert result.exit_code == 0, result.output
    assert "--fail-if" in clipress("bench", "--help").output


@pytest.mark.parametrize("name", ["load", "run", "costs"])
def test_a_run_folder_may_be_named_like_a_command(tiny_run, tmp_path, monkeypatch, name):
    shutil.copytree(tiny_run[0], tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "triton"))
    monkeypatch.chdir(tmp_path)
    result = clipress("bench", name, "--stage", "int8", *QUICK)
    assert result.exit_code == 0, result.output
    assert results_of(tmp_path / name / "bench" / "compared")["conditions"]["command"].startswith(
        f"clipress bench {name} "
    )


@pytest.mark.parametrize("opening_ms, expected", [(10, {"a", "b"}), (1e6, set())])
def test_sessions_are_reopened_only_if_all_open_quickly(monkeypatch, opening_ms, expected):
    from types import SimpleNamespace

    from clipress.bench import run as room
    from clipress.bench.results import Case
    from clipress.bench.settings import BenchSettings

    now = [0.0]
    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])

    def runner(ms):
        return SimpleNamespace(fresh_query=lambda graph, batch, ids: now.__setitem__(0, now[0] + ms / 1000))

    runners = {"a": runner(10), "b": runner(opening_ms)}
    case, settings = Case("image", 1), BenchSettings()
    assert set(room.renewable(case, runners, settings)) == expected
    assert room.renewable(case, runners | {"c": SimpleNamespace(fresh_query=None)}, settings) == {}
