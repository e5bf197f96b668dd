"""`clipress export --verify` reports whether copied files compute the right results on this machine."""

import shutil

import onnx
import pytest
from helpers import clipress

from clipress.runtime import onnx_session
from clipress.runtime.cpu import processor


@pytest.fixture
def copied(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0] / "export" / "int8", tmp_path / "copied")
    return tmp_path / "copied"


def test_every_file_of_a_folder_is_verified_and_the_cpu_is_named(copied):
    done = clipress("export", "--verify", copied)
    assert done.exit_code == 0, done.output
    first, *lines = done.output.splitlines()
    assert first == str(processor()) and len(lines) == 2
    for line, name in zip(lines, ("image.onnx", "text.onnx"), strict=True):
        assert line.startswith(f"{copied / name}: int8, matches exact arithmetic (minimum cosine ")


def test_a_run_is_verified_stage_by_stage_and_a_file_alone(tiny_run, copied):
    done = clipress("export", tiny_run[0], "--verify")
    assert done.exit_code == 0 and done.output.count("matches exact arithmetic") == 2 * 5
    alone = clipress("export", copied / "text.onnx", "--verify")
    assert alone.exit_code == 0 and alone.output.count("matches") == 1


def test_a_session_that_disagrees_ends_with_one_message(copied, monkeypatch):
    monkeypatch.setattr(onnx_session, "least_cosine", lambda *_: 0.4)
    failed = clipress("export", "--verify", copied)
    assert failed.exit_code == 2 and "Traceback" not in failed.output
    assert f"{copied / 'image.onnx'} fails its self-test" in failed.output
    assert str(processor()) in failed.output and "portable: true" in failed.output


@pytest.mark.parametrize("change", ["truncated", "no self-test", "nothing"])
def test_files_that_cannot_be_verified_are_refused(copied, tmp_path, change):
    source = copied
    if change == "truncated":
        (copied / "text.onnx").write_bytes((copied / "text.onnx").read_bytes()[:-100])
    elif change == "no self-test":
        model = onnx.load(copied / "image.onnx")
        del model.metadata_props[:]
        source = tmp_path / "image.onnx"
        onnx.save(model, source)
    else:
        source = tmp_path / "empty"
        source.mkdir()
    failed = clipress("export", "--verify", source)
    messages = {
        "truncated": "truncated or changed",
        "no self-test": "has no self-test",
        "nothing": "has no exported files",
    }
    assert failed.exit_code == 2 and messages[change] in failed.output


def test_verifying_takes_no_other_option(copied):
    failed = clipress("export", "--verify", copied, "--tensorrt")
    assert failed.exit_code == 2 and "--verify exports nothing" in failed.output
