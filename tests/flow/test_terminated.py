"""SIGTERM outside training ends a command with exit code 143 and one line; locks are released and nothing is left half-written."""

import os
import signal
import subprocess
import sys

import pytest

from clipress import storage

PROGRAM = """
import sys, time
from pathlib import Path
from unittest import mock
from clipress import storage
from clipress.cli import main

def work(*_, **__):
    def fill(aside):
        (aside / "file").write_text("half")
        print("working", flush=True)
        time.sleep(60)

    with storage.locked(Path(sys.argv[1])):
        storage.write_whole(Path(sys.argv[1]) / "made", fill)

with mock.patch(sys.argv[2], work):
    main(sys.argv[3:])
"""
COMMANDS = {
    "eval": "clipress.workflow.evaluate.evaluate_run",
    "latency-table": "clipress.workflow.bench.measure_latency_table",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_ends_a_command_with_143_and_one_line(command, tmp_path):
    arguments = [command, tmp_path] + (["--out", tmp_path / "costs.json"] if command == "latency-table" else [])
    run = [sys.executable, "-c", PROGRAM, tmp_path, COMMANDS[command], *arguments]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as job:
        assert job.stdout.readline() == "working\n"
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 143
    assert errors == "Stopped by SIGTERM. Finished work is kept; run the same command again to resume.\n"
    assert [path.name for path in tmp_path.iterdir()] == [storage.LOCK]
    with storage.locked(tmp_path):  # raises if it is still held
        pass


def test_a_command_leaves_the_handler_of_its_caller_as_it_was():
    from helpers import clipress

    before = signal.getsignal(signal.SIGTERM)
    assert clipress("data", "--help").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) == before
