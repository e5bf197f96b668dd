"""Writes are atomic, a folder is locked for one process, and the errors of a full disk are one message."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from helpers import HOLDER, lock_held

from clipress import storage
from clipress.errors import ArtifactError
from clipress.storage import leftovers, locked, sweep, write_bytes_whole, write_whole


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a lock until its input ends or it is killed."""
    with lock_held(tmp_path / "run") as process:
        yield process


def test_a_folder_locked_by_another_process_is_refused(holder, tmp_path):
    with pytest.raises(ArtifactError, match="in use by another clipress process"), locked(tmp_path / "run"):
        pass


def test_a_killed_process_leaves_no_lock_behind(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        pass


def test_locking_a_shared_folder_waits(holder, tmp_path):
    messages = []

    def wait(message):
        messages.append(message)
        holder.stdin.close()  # This releases the lock.

    with locked(tmp_path / "run", wait):
        assert len(messages) == 1 and "waiting" in messages[0]


def test_forked_children_do_not_keep_the_lock(tmp_path):
    code = HOLDER.replace("print", "import os; os.fork() or time.sleep(60); print")
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        children = (f"/proc/{process.pid}/task/{process.pid}/children",)
        worker = int(open(*children).read())  # noqa: PTH123
        process.kill()
        process.wait()
        with locked(tmp_path / "run"):
            os.kill(worker, signal.SIGKILL)  # The worker has outlived its parent.


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_full_disk_is_reported_and_the_previous_content_kept(tmp_path, monkeypatch, call):
    target = tmp_path / "stage"
    write_whole(target, lambda folder: (folder / "x").write_text("old"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(ArtifactError, match=rf"No space left.*Free some space in {tmp_path}"),
    ):
        patch.setattr(os, call, full)
        write_whole(target, lambda folder: (folder / "x").write_text("new"))
    sweep(tmp_path)
    assert (target / "x").read_text() == "old" and names(tmp_path) == ["stage"]


def test_full_disk_errors_of_libraries_are_recognised_and_other_errors_pass_through(tmp_path):
    def like_safetensors(_):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def wrong(_):
        raise RuntimeError("shapes differ")

    with pytest.raises(ArtifactError, match="could not be written"):
        write_whole(tmp_path / "a", like_safetensors)
    with pytest.raises(RuntimeError, match="shapes differ"):
        write_whole(tmp_path / "a", wrong)
    assert names(tmp_path) == []


def test_files_and_their_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    seen, rename, replace = [], os.rename, os.replace
    monkeypatch.setattr(
        storage, "flush", lambda path: seen.append(path.name.split(".")[1 if "tmp" in path.name else 0])
    )
    monkeypatch.setattr(os, "rename", lambda a, b: seen.append("rename") or rename(a, b))
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append("rename") or replace(a, b))
    write_whole(tmp_path / "stage", lambda folder: (folder / "x").write_text("new"))
    write_bytes_whole(tmp_path / "file", b"")
    assert seen == ["x", "stage", "rename", tmp_path.name, "file", "rename", tmp_path.name]


def test_leftovers_of_killed_writers_are_removed_and_interrupted_replacements_restored(tmp_path):
    for name in (".stage.12.old", ".stage.12.tmp", ".other.7.old", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / ".stage.12.old" / "x").write_text("old")
    (tmp_path / "run" / "other" / ".x.json.9.tmp").write_text("")
    (tmp_path / "run" / ".mine").write_text("")
    assert len(leftovers(tmp_path / "run")) == 3
    sweep(tmp_path / "run")
    assert names(tmp_path / "run") == [".mine", "other", "stage"] and names(tmp_path / "run" / "other") == []
    assert (tmp_path / "run" / "stage" / "x").read_text() == "old"


def test_a_reused_process_id_can_write(tmp_path):
    (tmp_path / "stage").mkdir()
    old = tmp_path / f".stage.{os.getpid()}.old"
    old.mkdir()
    (old / "x").write_text("")
    write_whole(tmp_path / "stage", lambda folder: (folder / "x").write_text("new"))
    assert names(tmp_path) == ["stage"]
