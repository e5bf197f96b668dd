"""Jobs that are killed, stopped, started twice or run out of disk space lose nothing and repeat nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import clipress, torchrun, write_recipe
from PIL import Image

from clipress.artifact import load_artifact, read_header
from clipress.compress.learner import Learner
from clipress.storage import locked

KILLS = Path(__file__).with_name("kill_jobs.py")
STOPPED_JOB = Path(__file__).with_name("stopped_job.py")


def killed(tmp_path, *arguments):
    command = [sys.executable, KILLS, "--out", tmp_path, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads((tmp_path / "faults_kills.json").read_text())["kills"]


def test_a_killed_search_resumes_to_the_same_bytes(tmp_path):
    assert all(row["bit-exact"] for row in killed(tmp_path, "--kills", 2, "--only", "prune, fisher, guided"))


@pytest.mark.slow
def test_sixty_kills_lose_no_work(tmp_path):
    assert all(row["bit-exact"] for row in killed(tmp_path, "--kills", 60, "--seed", 1))


@pytest.fixture
def short(recipe, tiny_run):
    """A recipe with one stage and an existing teacher."""
    recipe["teacher"] = {"artifact": str(tiny_run[0] / "teacher")}
    recipe["stages"] = [{"distill": {"losses": ["contrastive", "feature"], "steps": 6, "batch_size": 16}}]
    recipe["data"]["val"] = recipe["data"]["test"] = []
    recipe["runtime"] = {"checkpoint_every": 2}
    return recipe


def weights_of(run):
    return (run / "distilled" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_is_one_message_with_its_own_exit_code(short, tmp_path, monkeypatch, number, code):
    path = write_recipe(short, tmp_path)
    assert clipress("compress", path, "--out", tmp_path / "a").exit_code == 0
    update, seen = Learner.update, []

    def stopped(self, rate):
        seen.append(rate)
        if len(seen) == 3:
            signal.raise_signal(number)
        update(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", stopped)
        result = clipress("compress", path, "--out", tmp_path / "b")
    assert result.exit_code == code and "Traceback" not in result.output
    assert result.output.count("stopped by") == 1 and "after 3 of 6 steps" in result.output
    assert clipress("run", path, "--out", tmp_path / "b", "--resume").exit_code == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert (tmp_path / "b" / "distilled" / "open_clip").is_dir() and not (tmp_path / "b" / "checkpoints").exists()


def test_ctrl_c_between_steps_is_one_message_too(short, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("clipress.compress.pipeline.start_fabric", interrupted)
    result = clipress("compress", write_recipe(short, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 130 and result.output.startswith("Interrupted.") and "Traceback" not in result.output


def test_fresh_reruns_finished_stages(short, tmp_path):
    path = write_recipe(short, tmp_path)
    for fresh, finished in (((), 0), ((), 1), (("--fresh",), 0)):
        result = clipress("compress", path, "--out", tmp_path / "run", *fresh)
        assert result.exit_code == 0 and result.output.count("distilled: reused") == finished, result.output


def test_a_run_in_use_by_another_process_is_refused(short, tmp_path):
    path, run = write_recipe(short, tmp_path), tmp_path / "run"
    assert clipress("compress", path, "--out", run).exit_code == 0
    for command in (["compress", path, "--out", run], ["export", run], ["serve", run]):
        child = os.fork()  # A process is not blocked by its own locks.
        if child == 0:
            code = 1
            try:
                result = clipress(*command)
                code = result.exit_code if "in use by another clipress process" in result.output else 1
            finally:
                os._exit(code)
        with locked(run):
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2, command


def test_a_changed_caption_reruns_its_stage_and_later_ones(short, tmp_path):
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png\tan image, number {number}" for number in range(4)]
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    short["data"]["train"] = [{"format": "csv", "annotations": str(tmp_path / "pairs.csv")}]
    short["stages"] = [{"distill": {"losses": ["contrastive"], "steps": 2, "batch_size": 4}}]
    short["stages"].append({"sparsify": {"losses": ["contrastive"], "steps": 1, "batch_size": 4}})
    path, run = write_recipe(short, tmp_path), tmp_path / "run"

    def run_again():
        from clipress.data.sources import open_source

        open_source.cache_clear()  # A new process would start with an empty cache.
        for command in (["compress", path, "--out", run], ["export", run]):
            result = clipress(*command)
            assert result.exit_code == 0, result.output
        compressed = clipress("compress", path, "--out", run).output
        assert compressed.count(": reused,") == 2 and clipress("export", run).output.count("already exported") == 3
        return [record["hash"] for record in read_header(run / "sparse")["lineage"][-2:]]

    first = run_again()
    assert run_again() == first
    rows[2] = "2.png\tan image, changed"
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    assert all(a != b for a, b in zip(first, run_again(), strict=True))


def without_times(run, stage):
    header = read_header(run / stage)
    for record in header["lineage"]:
        for key in ("seconds", "peak_memory_mb"):
            record.pop(key, None)
            record.get("details", {}).pop(key, None)
    return header


def test_the_same_recipe_gives_bitwise_equal_artifacts_in_every_stage(tiny_run, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "cache"))  # The teacher is trained again too.
    result = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 0 and ": reused," not in result.output, result.output
    for stage in ("teacher", "pruned", "recovered", "sparse", "int8"):
        wanted, found = (load_artifact(run / stage).weights for run in (tiny_run[0], tmp_path / "run"))
        assert wanted.keys() == found.keys() and all(wanted[name].equal(found[name]) for name in wanted), stage
        assert without_times(tmp_path / "run", stage) == without_times(tiny_run[0], stage)
    machine = read_header(tmp_path / "run" / "int8")["lineage"][-1]["machine"]
    assert machine.keys() == {"processor", "cpu", "threads", "device", "processes"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_processes_of_a_training_run_stop_at_the_same_step_and_resume_to_the_same_weights(tmp_path, strategy):
    done = torchrun(STOPPED_JOB, tmp_path, strategy, 2)
    assert done.returncode != 0 and "exitcode  : 75" in done.stderr, done.stderr[-3000:]
    first, second = sorted((tmp_path / "kept").iterdir())
    assert [path.name for path in (first, second)] == [f"rank{n}-00000004.pt" for n in (0, 1)]
    assert second.stat().st_size < 0.01 * first.stat().st_size  # what all have in common is stored once
    (tmp_path / "alone").mkdir()
    for home in (tmp_path, tmp_path / "alone"):
        done = torchrun(STOPPED_JOB, home, strategy)
        assert done.returncode == 0, done.stderr[-3000:]
    made, wanted = (torch.load(home / "made.pt") for home in (tmp_path, tmp_path / "alone"))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 9
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())


def in_one_process(home, *stop):
    command = [sys.executable, STOPPED_JOB, home, "auto", *map(str, stop)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("before", ["fsdp2", "one process"])
def test_a_run_goes_on_with_more_or_fewer_processes_and_says_so(tmp_path, before):
    """A checkpoint holds whole tensors, whatever the strategy."""
    fewer = before == "fsdp2"
    stopped = torchrun(STOPPED_JOB, tmp_path, "fsdp2", 2) if fewer else in_one_process(tmp_path, 2)
    assert stopped.returncode != 0 and [path.name for path in (tmp_path / "kept").glob("rank0-*")]
    done = in_one_process(tmp_path) if fewer else torchrun(STOPPED_JOB, tmp_path, "ddp")
    (tmp_path / "whole").mkdir()
    for one in (done, in_one_process(tmp_path / "whole")):
        assert one.returncode == 0, one.stderr[-3000:]
    counts = (1, 2) if fewer else (2, 1)
    assert done.stderr.count(f"on another number of processes ({counts[0]}, before: {counts[1]})") == 1
    logs = [(home / "log.jsonl").read_text().splitlines() for home in (tmp_path, tmp_path / "whole")]
    found, alone = ([json.loads(line) for line in log] for log in logs)
    assert [row["step"] for row in found if "loss" in row] == [row["step"] for row in alone] == [*range(9)]
    (said,) = [row for row in found if "loss" not in row]
    assert (said["processes"], said["processes_before"]) == counts and said["step"] in (3, 4)
    made, wanted = (torch.load(home / "made.pt") for home in (tmp_path, tmp_path / "whole"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-3)  # nine steps of Adam move a weight by 5e-3


@pytest.fixture
def small_disk(tmp_path):
    """A file system with 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a file system needs more rights")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def one_message(result, *words):
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.output, result.exception)
    for word in words:
        assert word in result.output, result.output


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 8_000, 3_000_000, 9_000_000, 21_000_000, 23_000_000])
def test_a_full_disk_is_one_message_and_the_run_resumes_with_more_space(short, tmp_path, small_disk, free):
    path, run = write_recipe(short, tmp_path), small_disk / "run"
    assert clipress("compress", path, "--out", tmp_path / "a").exit_code == 0
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(24 * 2**20 - 4096 * 8 - free))
    for command in (["compress", path, "--out", run], ["export", run]):
        result = clipress(*command)
        if result.exit_code:
            one_message(result, "could not be written", str(run), "Free some space")
            assert ".tmp" not in result.output
            break
    else:
        pytest.fail("expected the disk to fill up")
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    assert clipress("compress", path, "--out", run).exit_code == 0 and clipress("export", run).exit_code == 0
    assert weights_of(tmp_path / "a") == weights_of(run)
    assert not [left for left in run.rglob(".*") if left.name != ".lock"]


@pytest.mark.slow
def test_a_read_only_disk_is_one_message(short, tmp_path, small_disk):
    path, run = write_recipe(short, tmp_path), small_disk / "run"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    one_message(clipress("compress", path, "--out", run), str(run), "make it writable")
    assert not run.exists()
    subprocess.run(["mount", "-o", "remount,rw,size=200m", small_disk], check=True)
    assert clipress("compress", path, "--out", run).exit_code == 0
    shutil.rmtree(run / "distilled")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    one_message(clipress("compress", path, "--out", run), str(run), "make it writable")
